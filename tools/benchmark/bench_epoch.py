"""Profile one training epoch, and compare it with the network on its own.

The script trains a config for three epochs, the first of which is a warm-up:

* one normal epoch: images per second, with and without clustering;
* one with a device synchronization around each phase: data, forward, loss, backward, check,
  optimizer, banks, extraction, clustering. The synchronization costs time, so only the
  fractions are comparable.

Both are compared with the network on its own: forward, backward and optimizer step on a
batch of random images on the device. The script also measures the images per second that
one process reads and augments, which shows how many of them (``DATALOADER.NUM_WORKERS``)
keep the device busy.

    python tools/benchmark/bench_epoch.py --config-file configs/SyntheticPersons/scl.yml
    python tools/benchmark/bench_epoch.py --device cuda --amp --output epoch.json \
        --config-file configs/Market1501/selcon_cluster_R50.yml DATALOADER.NUM_WORKERS 15
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench_step import Stopwatch, describe_machine
from selcon_plugin.features import Embeddings
from selcon_plugin.hosts import load_config
from selcon_plugin.samplers.stream import SampleKey


class Phases:
    """Timer of functions; nested timed functions are counted only by themselves."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._watch = Stopwatch(device)
        self._inside: list[str] = ["other"]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time is added to ``name``."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._record()
            self._inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._record()
                self._inside.pop()

        return wrapped

    def start(self) -> None:
        """Reset all times."""
        self.seconds.clear()
        self._watch.lap()

    def stop(self) -> None:
        """Add the time since the last phase to ``other``."""
        self._record()

    def _record(self) -> None:
        self.seconds[self._inside[-1]] += self._watch.lap()


class TimedBatches:
    """Iterator that times the wait for each batch."""

    def __init__(self, batches: Any, phases: Phases) -> None:
        self._batches = batches
        self._next = phases.timed("data", lambda: next(batches))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._next()

    def close(self) -> None:
        """Stop the data loader processes."""
        self._batches.close()


def measure(cfg: Any) -> dict[str, Any]:
    """Train three epochs and time them.

    Args:
        cfg: Complete config.

    Returns:
        Measurements by name.
    """
    from fastreid.data.build import fast_batch_collator
    from fastreid.utils.events import EventStorage

    from selcon_plugin.fastreid_ext import SelConTrainer
    from selcon_plugin.fastreid_ext.embedding import unwrap
    from selcon_plugin.fastreid_ext.hooks import MethodHook

    trainer = SelConTrainer(cfg)
    run = next(hook for hook in trainer._hooks if isinstance(hook, MethodHook))._run
    phases = Phases(torch.device(cfg.MODEL.DEVICE))
    clustering: dict[str, float] = {}
    run.report = clustering.update
    with EventStorage(0) as trainer.storage:
        run.before_training()
        train_epoch(trainer, run, 0)  # warms up
        before_steps, steps = train_epoch(trainer, run, 1)
        _time_phases(trainer, run, unwrap(trainer.model).method, phases)
        train_epoch(trainer, run, 2, phases)
    result: dict[str, Any] = {
        "step_seconds": steps / trainer.iters_per_epoch,
        "before_steps_seconds": before_steps,
        "phases": dict(phases.seconds),
    }
    for name in ("extraction", "clustering"):
        if f"{name}_seconds" in clustering:
            result["phases"][name] = clustering[f"{name}_seconds"]
    images = cfg.SOLVER.IMS_PER_BATCH
    network = time_network(unwrap(trainer.model), trainer._trainer, cfg)
    return {
        **result,
        "steps": trainer.iters_per_epoch,
        "batch_size": images,
        "network_images_per_second": images / network,
        "one_reader_images_per_second": images
        / time_reading(trainer.data_loader.dataset, images, fast_batch_collator),
        "steps_images_per_second": images / result["step_seconds"],
        "epoch_images_per_second": images
        * trainer.iters_per_epoch
        / (before_steps + steps),
        "steps_ratio_to_network": network / result["step_seconds"],
    }


def train_epoch(
    trainer: Any, run: Any, epoch: int, phases: Phases | None = None
) -> tuple[float, float]:
    """Train one epoch like the trainer's own loop.

    Args:
        trainer: FastReID trainer.
        run: Training run of the trainer.
        epoch: Epoch, counted from 0.
        phases: Timer of the phases of the steps; stopped at the end of the last step.

    Returns:
        Seconds before the first step (extraction, clustering), and of the steps.
    """
    watch = Stopwatch(torch.device(trainer.cfg.MODEL.DEVICE))
    trainer.iter = epoch * trainer.iters_per_epoch
    run.start_epoch(epoch)
    run.refresh_pseudo_labels(epoch, trainer.iter)
    trainer.restart_data()
    before_steps = watch.lap()
    batches = trainer._trainer._data_loader_iter
    if phases is not None:
        trainer._trainer._data_loader_iter = TimedBatches(batches, phases)
        phases.start()
    for _ in range(trainer.iters_per_epoch):
        run.start_step(trainer.iter)
        trainer.run_step()
        run.after_step()
        trainer.iter += 1
    steps = watch.lap()
    if phases is not None:
        phases.stop()
    batches.close()
    return before_steps, steps


def _time_phases(trainer: Any, run: Any, method: Any, phases: Phases) -> None:
    from selcon_plugin.engine import step

    for owner, name, phase in (
        (trainer._trainer, "_forward", "forward"),
        (step, "_backward", "backward"),
        (run.guard, "check", "check"),
        (step, "_update_weights", "optimizer"),
        (method, "loss", "loss"),
        (run, "after_step", "banks"),
    ):
        setattr(owner, name, phases.timed(phase, getattr(owner, name)))


def time_network(network: Any, steps: Any, cfg: Any, turns: int = 5) -> float:
    """Time the network on random images on its device, without loss and banks.

    Args:
        network: Network with its method.
        steps: Object that runs the training steps.
        cfg: Config.
        turns: Number of timed turns, after a warm-up.

    Returns:
        Median seconds of a step.
    """
    device = torch.device(cfg.MODEL.DEVICE)
    height, width = cfg.INPUT.SIZE_TRAIN
    images = torch.randn(cfg.SOLVER.IMS_PER_BATCH, 3, height, width, device=device)
    seconds = []
    for turn in range(turns + 1):
        watch = Stopwatch(device)
        steps.optimizer.zero_grad()
        with steps.autocast():
            found: Embeddings = network.embed(images, student=True)
        features: list[Tensor] = [found.global_features]
        if found.part_features is not None:
            features.append(found.part_features)
        torch.stack([f.float().square().mean() for f in features]).sum().backward()
        steps.optimizer.step()
        if turn:
            seconds.append(watch.lap())
    return statistics.median(seconds)


def time_reading(
    dataset: Any, num_images: int, collate: Callable[..., Any], turns: int = 3
) -> float:
    """Time one process that reads and augments a batch of training images.

    Args:
        dataset: Training images.
        num_images: Images in the batch.
        collate: Function that collates samples into a batch.
        turns: Number of timed turns, after a warm-up.

    Returns:
        Median seconds of a batch.
    """
    seconds = []
    for turn in range(turns + 1):
        started = time.perf_counter()
        places = range(turn * num_images, (turn + 1) * num_images)
        collate([dataset[SampleKey(i % len(dataset), i)] for i in places])
        if turn:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def report(measured: dict[str, Any]) -> str:
    """Format the measurements in Markdown."""
    phases = measured["phases"]
    total = sum(phases.values())
    lines = ["| phase | seconds | fraction |", "| --- | --- | --- |"]
    for name, seconds in sorted(phases.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {seconds:.2f} | {seconds / total:.1%} |")
    lines += ["", "| images/s | |", "| --- | --- |"]
    for name in ("network", "steps", "epoch", "one reader"):
        rate = measured[f"{name.replace(' ', '_')}_images_per_second"]
        lines.append(f"| {name} | {rate:.1f} |")
    ratio = measured["steps_ratio_to_network"]
    lines += ["", f"Speed of the steps relative to the network: {ratio:.1%}"]
    return "\n".join(lines)


def main() -> None:
    """Measure and print the report."""
    parser = argparse.ArgumentParser(description="Profile one epoch of a config.")
    parser.add_argument("--config-file", required=True, metavar="FILE.yml")
    parser.add_argument("--device", default="", help="cpu or cuda; default: the config's")
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument(
        "--steps", type=int, default=0, help="per epoch; default: the config's"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    args = parser.parse_args()
    options = list(args.opts)
    if args.device:
        options += ["MODEL.DEVICE", args.device]
    if args.amp:
        options += ["SOLVER.AMP.ENABLED", "True"]
    if args.steps:
        options += ["MODEL.SELCON.ITERS_PER_EPOCH", str(args.steps)]
    with tempfile.TemporaryDirectory() as folder:
        cfg = load_config(args.config_file, [*options, "OUTPUT_DIR", folder])
        started = time.perf_counter()
        measured = measure(cfg)
    device = torch.device(cfg.MODEL.DEVICE)
    measured["machine"] = describe_machine(device)
    print(report(measured))
    print(f"\n{time.perf_counter() - started:.0f} s; {json.dumps(measured['machine'])}")
    if args.output:
        args.output.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
