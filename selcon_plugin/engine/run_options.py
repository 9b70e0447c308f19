"""Options of a run that do not belong to a method or a labeler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from selcon_plugin.clustering import labeler_names
from selcon_plugin.engine.best_weights import KEEP_BEST_BY, NEVER
from selcon_plugin.engine.guard import SKIP
from selcon_plugin.methods import method_names
from selcon_plugin.models.wave_block import WaveBlockKind
from selcon_plugin.options import Choice, ChoiceOf, Interval
from selcon_plugin.samplers.cluster import AUTO, STREAM_SAMPLER
from selcon_plugin.samplers.planners import planner_names

_Fraction = Interval(0, 1, below=True)


def _sampler_names() -> tuple[str, ...]:
    return (AUTO, STREAM_SAMPLER, *planner_names())


@dataclass(frozen=True)
class RunOptions:
    """Options of every run; config keys, their checks and the tables are generated from it.

    Attributes:
        method: Registered name of the training method.
        num_parts: Number S of horizontal parts; 0 trains on global features only. It must
            divide the embedding dimension; methods without parts ignore it. ``auto`` is 8,
            or the largest smaller number that the feature map and the dimension allow.
        project_global: Whether a linear layer precedes the normalization of the global
            feature.
        diagnostics_period: Steps between reports of neighbor quality to log, JSON and
            TensorBoard; 0 for none.
        keep_checkpoints: Number of periodic checkpoints to keep, the newest ones; 0 keeps
            all. They contain the banks.
        keep_best_by: Label-free criterion by which the weights of the best epoch are kept,
            in ``best_without_labels.pth``: fewest outliers, or the largest stability,
            silhouette by the Jaccard distance, or silhouette by the cosine distance
            (``cosine_silhouette``). The last one also measures the network before training,
            and the run ends with a verdict. The images are clustered once more after the
            last epoch ([how reliable each
            is](../docs/benchmarks/market1501.md#label-free-criteria)).
        sampler: How batches are sampled: ``stream`` shuffles all images; ``pk_camera``
            takes K images of each of P clusters, from different cameras where possible;
            ``pk`` ignores cameras; ``proxy`` takes K images of each of P cluster-camera
            pairs; ``group`` takes whole clusters; ``shuffle`` takes all images of an epoch.
            ``auto`` selects the method's own sampler. K is ``DATALOADER.NUM_INSTANCE``, in
            torchreid ``sampler.num_instances``.
        outlier_ratio: Fraction of each batch that is sampled from outliers, in whole blocks
            of K; 0 leaves outliers out.
        iters_per_epoch: Steps per epoch; with 0 an epoch samples as many images as the
            training set has.
        micro_batches: Number of micro-batches into which each batch is split for one
            optimizer step, if the batch does not fit on the GPU. Clusters stay whole.
        ghost_batch_size: Number of images that batch normalization sees together, in every
            layer of backbone and head, as if the batch were spread over several GPUs. 0
            uses the whole batch.
        extra_images: Folder of additional training images, such as generated ones; their
            cameras are unknown.
        max_unreadable_ratio: Fraction of the training images that may be unreadable. Such
            files are left out and reported once; if there are more, the run stops and lists
            them.
        wave_block: WaveBlock after the second and third stage of the backbone, only in
            training (JCL): a random band of rows keeps its values, the others are scaled
            up; ``attentive`` puts a residual CBAM before each, which remains in the test.
        ema_decay: Weight of the old value in an EMA teacher of the network. The teacher
            extracts the features for clustering and is evaluated. 0 disables it.
        on_nonfinite: Reaction to NaN or infinity in a step's losses, features or gradients,
            and in extracted features: skip them with a warning, or stop the run. Either
            way such a step changes no weight and no bank.
        max_nonfinite_steps: Consecutive skipped steps after which the run stops even with
            ``skip``.
        report_images: Whether the run's ``report.html`` shows crops; see
            [docs/report.md](../docs/report.md).
        tensorboard_pictures: Whether to write contact sheets of the largest clusters and
            the embedding projector, of at most 1,000 images, to TensorBoard when the
            training ends; they show the crops.
        seed: Seed of all randomness in a run.
    """

    method: Annotated[str, ChoiceOf(method_names)] = "SelectiveContrastive"
    num_parts: Annotated[int | Literal["auto"], Interval(0)] = "auto"
    project_global: bool = True
    diagnostics_period: Annotated[int, Interval(0)] = 20
    keep_checkpoints: Annotated[int, Interval(0)] = 0
    keep_best_by: Annotated[str, Choice(KEEP_BEST_BY)] = NEVER
    sampler: Annotated[str, ChoiceOf(_sampler_names)] = AUTO
    outlier_ratio: Annotated[float, _Fraction] = 0.0
    iters_per_epoch: Annotated[int, Interval(0)] = 0
    micro_batches: Annotated[int, Interval(1)] = 1
    ghost_batch_size: Annotated[int, Interval(0)] = 0
    extra_images: str = ""
    max_unreadable_ratio: Annotated[float, _Fraction] = 0.05
    wave_block: Annotated[str, Choice(("none", *get_args(WaveBlockKind)))] = "none"
    ema_decay: Annotated[float, _Fraction] = 0.0
    on_nonfinite: Annotated[str, Choice((SKIP, "stop"))] = SKIP
    max_nonfinite_steps: Annotated[int, Interval(1)] = 10
    report_images: bool = True
    tensorboard_pictures: bool = False
    seed: Annotated[int, Interval(0, 2**32 - 1)] = 0  # the range of NumPy


@dataclass(frozen=True)
class ClusteringOptions:
    """Options of clustering that do not belong to a labeler.

    Attributes:
        labeler: Registered name of the labeler, which clusters the images.
        period: Number of epochs from one clustering to the next.
        features: Clustered features: the global feature, or the test feature, which joins
            global and part features.
        center_cameras: Whether to center the features of each camera with at least 100
            images before clustering, so that the cameras' means agree.
        reliability: Whether to apply SpCL's self-paced criterion: clusters that split or
            merge at a slightly different eps lose their images.
        drop_single_camera: Whether images of clusters from only one camera become outliers
            (JCL).
        outliers: Treatment of outliers: ``drop`` leaves them without a cluster,
            ``singleton`` makes each a cluster of its own, ``nearest`` assigns each to the
            nearest cluster.
    """

    labeler: Annotated[str, ChoiceOf(labeler_names)] = "DBSCAN"
    period: Annotated[int, Interval(1)] = 1
    features: Annotated[str, Choice(("global", "fused"))] = "global"
    center_cameras: bool = False
    reliability: bool = False
    drop_single_camera: bool = False
    outliers: Annotated[str, Choice(("drop", "singleton", "nearest"))] = "drop"
