"""Soak test: train for thousands of steps with clustering and check for resource leaks.

The script trains a tiny network on synthetic images in FastReID, with all features of a
long run: a new clustering and a new loader each epoch, checkpoints, evaluations, a teacher.
After each epoch it records the memory of the process and of the GPU, open files and
threads.

    python tools/faults/soak.py --steps 2000 --report docs/reliability/soak.md

A quantity is flat if its value over the last fifth of the epochs exceeds that over the
second fifth by at most its bound; the first fifth is start-up. The script compares the
median memory, and the smallest numbers of files and threads, since TensorBoard's writer
opens its file occasionally. Exit status: 0 if all quantities are flat.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Largest allowed increase between the second and the last fifth of the epochs.
BOUNDS = {
    "memory_mib": 8.0,  # 10 to 300 steps took up to 2.9, still settling; 2,000 took 0.4
    "gpu_memory_mib": 1.0,
    "open_files": 0.0,
    "threads": 0.0,
}
LABELS = {
    "memory_mib": "memory of the process (MiB)",
    "gpu_memory_mib": "memory of tensors on the GPU (MiB)",
    "open_files": "open files",
    "threads": "threads",
}
COUNTS = ("open_files", "threads")
PARTS = 5


@dataclass(frozen=True)
class Sample:
    """Resources of the process after an epoch."""

    memory_mib: float
    gpu_memory_mib: float
    open_files: int
    threads: int


@dataclass(frozen=True)
class Growth:
    """Growth of a quantity.

    Attributes:
        name: Field of :class:`Sample`.
        early: Median, or smallest number, over the second fifth of the epochs.
        late: Median, or smallest number, over the last fifth of the epochs.
        highest: Largest value after the first fifth.
    """

    name: str
    early: float
    late: float
    highest: float

    @property
    def is_flat(self) -> bool:
        """True if the growth is within its bound."""
        return self.late - self.early <= BOUNDS[self.name]


def measure() -> Sample:
    """Measure the resources of this process."""
    import torch

    status = Path("/proc/self/status").read_text(encoding="utf-8")
    memory = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    on_gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return Sample(
        memory_mib=int(memory.split()[1]) / 1024,
        gpu_memory_mib=on_gpu / 2**20,
        open_files=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
    )


def find_growth(samples: list[Sample]) -> list[Growth]:
    """Compare the second and the last fifth of the samples.

    Args:
        samples: One sample per epoch.

    Returns:
        The growth of each quantity.

    Raises:
        ValueError: If there are fewer than five samples.
    """
    if len(samples) < PARTS:
        raise ValueError(f"{len(samples)} epochs are too few: at least {PARTS} are needed")
    size = len(samples) // PARTS
    result = []
    for name in BOUNDS:
        values = [asdict(sample)[name] for sample in samples]
        typical = min if name in COUNTS else statistics.median
        early = typical(values[size : 2 * size])
        late = typical(values[-size:])
        result.append(Growth(name, early, late, max(values[size:])))
    return result


def config(folder: Path, args: argparse.Namespace) -> Any:
    """Create the config of a long run of a tiny network."""
    import torch
    from fastreid.config import get_cfg

    from selcon_plugin.datasets import SyntheticPersonsSpec, generate_synthetic_persons
    from selcon_plugin.fastreid_ext import add_selcon_config

    spec = SyntheticPersonsSpec(
        num_train_ids=8, num_test_ids=4, images_per_id=5, num_cameras=3, num_distractors=3
    )
    generate_synthetic_persons(folder, spec)
    epochs = args.steps // args.steps_per_epoch
    values = {
        "MODEL.META_ARCHITECTURE": "SelCon",
        "MODEL.DEVICE": "cuda" if torch.cuda.is_available() else "cpu",
        "MODEL.BACKBONE.NAME": "build_timm_backbone",
        "MODEL.BACKBONE.TIMM_NAME": "test_resnet",
        "MODEL.SELCON.METHOD": args.method,
        "MODEL.SELCON.NUM_PARTS": 2,
        "MODEL.SELCON.EMA_DECAY": 0.99,
        "MODEL.SELCON.ITERS_PER_EPOCH": args.steps_per_epoch,
        "MODEL.SELCON.KEEP_CHECKPOINTS": 2,
        "MODEL.SELCON.CLUSTERING.MIN_SAMPLES": 2,
        "MODEL.SELCON.CLUSTERING.K1": 8,
        "MODEL.SELCON.CLUSTERING.K2": 3,
        "INPUT.SIZE_TRAIN": [64, 32],
        "INPUT.SIZE_TEST": [64, 32],
        "INPUT.FLIP.ENABLED": True,
        "DATASETS.NAMES": ("SyntheticPersons",),
        "DATASETS.TESTS": ("SyntheticPersons",),
        "DATALOADER.NUM_WORKERS": args.workers,
        "DATALOADER.NUM_INSTANCE": 4,
        "SOLVER.OPT": "SGD",
        "SOLVER.BASE_LR": 0.005,
        "SOLVER.IMS_PER_BATCH": 16,
        "SOLVER.MAX_EPOCH": epochs,
        "SOLVER.WARMUP_ITERS": 0,
        "SOLVER.CHECKPOINT_PERIOD": max(1, epochs // 20),
        "TEST.EVAL_PERIOD": max(1, epochs // 10),
        "OUTPUT_DIR": str(folder / "out"),
    } | {f"DATASETS.SYNTHETIC_PERSONS.{k.upper()}": v for k, v in vars(spec).items()}
    cfg = add_selcon_config(get_cfg())
    for key, value in values.items():
        cfg.merge_from_list([key, value])
    return cfg


def soak(folder: Path, args: argparse.Namespace) -> list[Sample]:
    """Train and return one sample per epoch."""
    os.environ["FASTREID_DATASETS"] = str(folder)  # read when FastReID is imported
    from selcon_plugin.fastreid_ext import SelConTrainer

    # Imported after the adapter, which patches it for current Python versions.
    from fastreid.engine.train_loop import HookBase  # isort: skip

    samples: list[Sample] = []

    class Recorder(HookBase):  # type: ignore[misc]
        def after_epoch(self) -> None:
            samples.append(measure())

    trainer = SelConTrainer(config(folder, args))
    trainer.resume_or_load(False)
    trainer.register_hooks([Recorder()])
    trainer.train()
    return samples


def as_markdown(args: argparse.Namespace, growths: list[Growth], seconds: float) -> str:
    """Format the report in Markdown."""
    import torch

    from selcon_plugin.runs.results import describe_device

    device = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    epochs = args.steps // args.steps_per_epoch
    lines = [
        "# Soak",
        "",
        f"`python tools/faults/soak.py --steps {args.steps} --steps-per-epoch "
        f"{args.steps_per_epoch} --method {args.method} --workers {args.workers}`:",
        f"{args.steps} steps of a tiny network on SyntheticPersons, with clustering before "
        f"each of {epochs} epochs, in {seconds:.0f} s on {device}, torch "
        f"{torch.__version__}.",
        "A quantity is flat if its value over the last fifth of the epochs exceeds that "
        "over the second fifth by at most the bound (median memory, fewest files and "
        "threads).",
        "",
        "| quantity | second fifth | last fifth | highest | bound on growth | flat |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {LABELS[g.name]} | {g.early:.1f} | {g.late:.1f} | {g.highest:.1f} | "
        f"{BOUNDS[g.name]:g} | {'yes' if g.is_flat else 'NO'} |"
        for g in growths
        if g.highest or g.name != "gpu_memory_mib"
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Train, check for growth, and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--steps-per-epoch", type=int, default=20)
    parser.add_argument("--method", default="SelConCluster")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        growths = find_growth(soak(Path(folder), args))
    report = as_markdown(args, growths, time.perf_counter() - started)
    print(report)
    if args.report:
        args.report.write_text(report)
    return int(not all(growth.is_flat for growth in growths))


if __name__ == "__main__":
    sys.exit(main())
