"""Options of a run that belong to no method and no labeler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, get_args

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
    """Options of every run. A config's keys, their checks and the tables are made from it.

    Attributes:
        method: Which method trains.
        num_parts: Horizontal parts S; 0 is global only. Must divide the embedding
            dimension; methods without parts build none.
        project_global: Linear layer before the global feature's normalization.
        diagnostics_period: Steps between reports of neighbor quality to log, JSON and
            TensorBoard; 0 for none.
        keep_checkpoints: How many periodic checkpoints to keep, the newest; 0 keeps all.
            They hold the banks.
        keep_best_by: Label-free criterion by which the weights of the best epoch are kept,
            in ``best_without_labels.pth``: fewest outliers, or the largest stability or
            silhouette. Clusters the images once more after the last epoch ([how reliable
            each is](../docs/benchmarks/market1501.md#label-free-criteria)).
        sampler: How batches are sampled: ``stream`` shuffles all images; ``pk_camera``
            takes K images of P clusters, from different cameras where it can; ``pk`` does
            without cameras; ``proxy`` takes K images of P cluster-camera pairs; ``group``
            whole clusters; ``shuffle`` all images of an epoch. ``auto`` is the method's
            own. K is ``DATALOADER.NUM_INSTANCE``, in torchreid ``sampler.num_instances``.
        outlier_ratio: Fraction of each batch that is sampled from outliers, in whole blocks
            of K; 0 leaves them out.
        iters_per_epoch: Steps per epoch; 0 is one pass over the images' number.
        micro_batches: Parts into which each batch is cut, one after the other, with one
            optimizer step: for a batch larger than the GPU. Clusters stay whole.
        ghost_batch_size: Images that batch normalization sees together, in every layer of
            backbone and head: on one GPU what a batch spread over several gives. 0 is the
            whole batch.
        extra_images: Folder of images that join the training set, such as generated ones;
            their cameras are unknown.
        max_unreadable_ratio: Fraction of the training images that may be unreadable; such
            files are left out and reported once, more of them stop the run with a list.
        wave_block: WaveBlock behind the second and third stage of the backbone, only in
            training (JCL): a random band of rows stays, the others grow; ``attentive`` puts
            a residual CBAM before each, which stays in the test.
        ema_decay: Weight of the old value in a teacher whose weights follow the network's;
            it extracts the features for clustering, and is tested. 0 is no teacher.
        on_nonfinite: What to do about NaN or infinity in a step's losses, features or
            gradients, and in extracted features: leave it out with a warning, or end the
            run. Nothing of such a step is written either way.
        max_nonfinite_steps: Steps skipped in a row after which the run ends all the same.
        report_images: Whether the run's ``report.html`` shows crops; see
            [docs/report.md](../docs/report.md).
        tensorboard_pictures: Write contact sheets of the largest clusters and the embedding
            projector, of at most 1,000 images, to TensorBoard when the training ends; they
            show the crops.
        seed: Seed of everything random in a run.
    """

    method: Annotated[str, ChoiceOf(method_names)] = "SelectiveContrastive"
    num_parts: Annotated[int, Interval(0)] = 8
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
    seed: Annotated[int, Interval(0)] = 0


@dataclass(frozen=True)
class ClusteringOptions:
    """Options of clustering that belong to no labeler.

    Attributes:
        labeler: What finds the clusters.
        period: Epochs from one clustering to the next.
        features: The clustered features: the global feature, or the test feature of global
            and parts.
        center_cameras: Center the features of each camera of 100 images or more before
            clustering, so that the cameras' means agree.
        reliability: SpCL's self-paced criterion: clusters that fall apart or merge at a
            slightly different eps lose their images.
        drop_single_camera: Images of clusters that only one camera sees become outliers
            (JCL).
        outliers: ``drop`` leaves them without a cluster, ``singleton`` makes each a
            cluster, ``nearest`` gives each the nearest cluster.
    """

    labeler: Annotated[str, ChoiceOf(labeler_names)] = "DBSCAN"
    period: Annotated[int, Interval(1)] = 1
    features: Annotated[str, Choice(("global", "fused"))] = "global"
    center_cameras: bool = False
    reliability: bool = False
    drop_single_camera: bool = False
    outliers: Annotated[str, Choice(("drop", "singleton", "nearest"))] = "drop"
