"""What the options of a run mean, for tables and for ``selcon config``.

Options of methods and labelers are described by their docstrings.
"""

MEANINGS = {
    "method": "which method trains",
    "num_parts": (
        "horizontal parts S; 0 is global only. Must divide the embedding dimension; "
        "methods without parts build none"
    ),
    "project_global": "linear layer before the global feature's normalization",
    "diagnostics_period": (
        "steps between reports of neighbor quality to log, JSON and TensorBoard; 0 for none"
    ),
    "keep_checkpoints": (
        "how many periodic checkpoints to keep, the newest; 0 keeps all. They hold the "
        "banks"
    ),
    "keep_best_by": (
        "keeps the weights of the epoch whose clusters were best by this label-free "
        "figure, in `best_without_labels.pth`: fewest outliers, or the largest stability "
        "or silhouette. Clusters the images once more after the last epoch ([what each is "
        "worth](../docs/benchmarks/market1501.md#label-free-figures))"
    ),
    "report_images": (
        "whether the run's `report.html` shows crops; see "
        "[docs/report.md](../docs/report.md)"
    ),
    "sampler": (
        "how batches are drawn: `stream` shuffles all images; `pk_camera` takes K images "
        "of P clusters, from different cameras where it can; `pk` does without cameras; "
        "`proxy` takes K images of P cluster-camera pairs; `group` whole clusters; "
        "`shuffle` all images of an epoch. `auto` is the method's own. K is "
        "`DATALOADER.NUM_INSTANCE`, in torchreid `sampler.num_instances`"
    ),
    "outlier_ratio": (
        "share of each batch drawn from outliers, in whole blocks of K; 0 leaves them out"
    ),
    "iters_per_epoch": "steps per epoch; 0 is one pass over the images' number",
    "micro_batches": (
        "parts into which each batch is cut, one after the other, with one optimizer "
        "step: for a batch larger than the GPU. Clusters stay whole"
    ),
    "ghost_batch_size": (
        "images that batch normalization sees together, in every layer of backbone and "
        "head: on one GPU what a batch spread over several gives. 0 is the whole batch"
    ),
    "extra_images": (
        "folder of images that join the training set, such as generated ones; their "
        "cameras are unknown"
    ),
    "max_unreadable_ratio": (
        "share of training images that may be unreadable; such files are left out and "
        "reported once, more of them stop the run with a list"
    ),
    "wave_block": (
        "WaveBlock behind the second and third stage of the backbone, in training alone "
        "(JCL): a random band of rows stays, the others grow; `attentive` puts a residual "
        "CBAM before each, which stays in the test"
    ),
    "ema_decay": (
        "weight of the old value in a teacher whose weights follow the network's; it "
        "extracts the features that are clustered, and is tested. 0 is no teacher"
    ),
    "on_nonfinite": (
        "what to do about NaN or infinity in a step's losses, features or gradients, and "
        "in extracted features: leave it out with a warning, or end the run. Nothing of "
        "such a step is written either way"
    ),
    "max_nonfinite_steps": "steps skipped in a row after which the run ends all the same",
    "tensorboard_pictures": (
        "write contact sheets of the largest clusters and the embedding projector, of at "
        "most 1,000 images, to TensorBoard when the training ends; they show the crops"
    ),
    "seed": "seed of everything random in a run",
    "labeler": "what finds the clusters",
    "period": "epochs from one clustering to the next",
    "features": (
        "what is clustered: the global feature, or the test feature of global and parts"
    ),
    "center_cameras": (
        "make the features of all cameras of 100 images or more alike in their means "
        "before they are clustered"
    ),
    "reliability": (
        "SpCL's self-paced criterion: clusters that fall apart or merge at a slightly "
        "different eps lose their images"
    ),
    "drop_single_camera": (
        "images of clusters that one camera alone sees become outliers (JCL)"
    ),
    "outliers": (
        "`drop` leaves them without a cluster, `singleton` makes each a cluster, "
        "`nearest` gives each the nearest cluster"
    ),
}
