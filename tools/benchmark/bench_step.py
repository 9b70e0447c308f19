"""Benchmark a training step without the backbone, against the backbone and plain code.

The script times one step of Selective Contrastive Learning (distance, selection, loss
forward and backward, bank update) against

* forward and backward of the backbone, a ResNet-50 with last stride 1 at 256x128, and
* a direct implementation of the method's definition (``plain_scl.py``).

All sides run interleaved (A B C A B C ...), so that a busy machine slows all of them; the
script prints medians, and ratios with the smallest and largest ratio of one turn.

    python tools/benchmark/bench_step.py
    python tools/benchmark/bench_step.py --num-images 12936 --batch-size 8 --skip-backbone
    python tools/benchmark/bench_step.py --device cuda --bank-dtype float16
    python tools/benchmark/bench_step.py --crossover --skip-backbone --skip-plain
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plain_scl import PlainSelectiveContrastive, PlainSettings
from selcon_plugin.distance import fused_distance
from selcon_plugin.features import Embeddings
from selcon_plugin.losses import selective_contrastive as loss_module
from selcon_plugin.methods import build_method
from selcon_plugin.methods.selective_contrastive import SelectiveContrastive
from selcon_plugin.selection import select_neighbors

GLOBAL_DIM, NUM_PARTS, PART_DIM = 2048, 8, 256
NUM_NEIGHBORS, NUM_NEGATIVES = 7, 500
NUM_CAMERAS = 6
IMAGE_SIZE = (256, 128)
PHASES = ("distance", "selection", "loss+backward", "update")
Seconds = dict[str, float]


class Batch(NamedTuple):
    """Batch on the device: bank rows, cameras and unit features."""

    index: Tensor
    camids: Tensor
    global_features: Tensor
    part_features: Tensor


class Stopwatch:
    """Stopwatch that synchronizes with the device before each lap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.lap()

    def lap(self) -> float:
        """Return the seconds since the last call and restart."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds = now - getattr(self, "_start", now)
        self._start = now
        return seconds


def random_units(*shape: int, generator: torch.Generator) -> Tensor:
    """Sample unit vectors along the last axis."""
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def make_method(
    num_images: int, bank_dtype: str, device: torch.device, generator: torch.Generator
) -> SelectiveContrastive:
    """Build the method with filled banks, past its warm-up."""
    method = build_method(
        "SelectiveContrastive",
        num_images,
        GLOBAL_DIM,
        NUM_PARTS,
        PART_DIM,
        num_neighbors=NUM_NEIGHBORS,
        num_negatives=NUM_NEGATIVES,
        bank_dtype=bank_dtype,
    )
    assert isinstance(method, SelectiveContrastive)
    memory = method.memory
    assert memory.part_bank is not None
    for start in range(0, num_images, 8192):  # in chunks: no second copy of the banks
        rows = slice(start, min(start + 8192, num_images))
        count = rows.stop - start
        memory.global_bank[rows] = random_units(count, GLOBAL_DIM, generator=generator)
        memory.mixture_bank[rows] = random_units(count, GLOBAL_DIM, generator=generator)
        memory.part_bank[rows] = random_units(
            count, NUM_PARTS, PART_DIM, generator=generator
        )
    method._bank_camids.random_(0, NUM_CAMERAS, generator=generator)
    method.start_epoch(method.warmup_epochs)
    return method.to(device)


def make_batch(
    method: SelectiveContrastive, batch_size: int, generator: torch.Generator
) -> Batch:
    """Sample bank rows, and features similar to them, as in training."""
    memory = method.memory
    assert memory.part_bank is not None
    device = memory.global_bank.device
    index = torch.randperm(method.num_images, generator=generator)[:batch_size].to(device)
    noise = random_units(batch_size, GLOBAL_DIM, generator=generator).to(device)
    part_noise = random_units(batch_size, NUM_PARTS, PART_DIM, generator=generator)
    return Batch(
        index,
        method._bank_camids[index],
        F.normalize(memory.global_bank[index].float() + noise, dim=1),
        F.normalize(memory.part_bank[index].float() + part_noise.to(device), dim=2),
    )


def time_package_step(method: SelectiveContrastive, batch: Batch) -> Seconds:
    """Time one complete training step: loss, backward, update."""
    embeddings = _with_gradient(batch)
    watch = Stopwatch(batch.index.device)
    losses = method.loss(embeddings, batch.index, batch.camids)
    torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
    method.update(batch.index, embeddings)
    return {"step": watch.lap()}


def time_package_phases(method: SelectiveContrastive, batch: Batch) -> Seconds:
    """Time the phases of one step, with a synchronization after each."""
    memory = method.memory
    embeddings = _with_gradient(batch)
    views = torch.stack(
        [embeddings.global_features, memory.concatenate_parts(_parts(embeddings))], dim=1
    )
    watch = Stopwatch(batch.index.device)
    distance = fused_distance(
        batch.global_features,
        batch.part_features,
        batch.camids,
        memory.global_bank,
        memory.part_bank,
        method._bank_camids,
    )
    seconds = {"distance": watch.lap()}
    positive_index, negative_index = select_neighbors(
        distance, batch.index, num_neighbors=NUM_NEIGHBORS, num_negatives=NUM_NEGATIVES
    )
    seconds["selection"] = watch.lap()
    loss = method.criterion(views, memory.mixture_bank, positive_index, negative_index)
    loss.sum().backward()
    seconds["loss+backward"] = watch.lap()
    memory.update(batch.index, batch.global_features, batch.part_features, positive_index)
    seconds["update"] = watch.lap()
    return seconds


def time_plain_step(plain: PlainSelectiveContrastive, batch: Batch) -> Seconds:
    """Time one step of the direct implementation, by phase and in total.

    Its banks are on the CPU: from a GPU the features are copied there, and the gradient
    back.

    Args:
        plain: Direct implementation with its banks.
        batch: Batch of the step.

    Returns:
        Seconds of each phase, and of the ``step``.
    """
    embeddings = _with_gradient(batch)
    watch = Stopwatch(batch.index.device)
    index, camids = batch.index.cpu(), batch.camids.cpu()
    features, parts = embeddings.global_features.cpu(), _parts(embeddings).cpu()
    distance = plain.distance(features.detach(), parts.detach(), camids)
    seconds = {"distance": watch.lap()}
    positives, negatives = plain.select(distance, index)
    seconds["selection"] = watch.lap()
    plain.loss(features, parts, positives, negatives).backward()  # type: ignore[no-untyped-call]
    seconds["loss+backward"] = watch.lap()
    plain.update(index, features.detach(), parts.detach(), positives)
    seconds["update"] = watch.lap()
    seconds["step"] = sum(seconds.values())
    return seconds


def _with_gradient(batch: Batch) -> Embeddings:
    return Embeddings(
        batch.global_features.clone().requires_grad_(),
        batch.part_features.clone().requires_grad_(),
    )


def _parts(embeddings: Embeddings) -> Tensor:
    assert embeddings.part_features is not None
    return embeddings.part_features


def make_backbone(device: torch.device) -> nn.Module:
    """Build timm's ResNet-50 with last stride 1, random weights."""
    # timm imports torchvision, whose compiled extension may need a patch.
    importlib.import_module("selcon_plugin.compat").prepare_torchvision()
    timm: Any = importlib.import_module("timm")
    backbone = timm.create_model(
        "resnet50", pretrained=False, num_classes=0, global_pool="", output_stride=16
    )
    return backbone.to(device).train()  # type: ignore[no-any-return]


def time_backbone(backbone: nn.Module, images: Tensor, amp: bool) -> Seconds:
    """Time forward and backward of the backbone."""
    backbone.zero_grad(set_to_none=True)
    watch = Stopwatch(images.device)
    with torch.autocast(images.device.type, enabled=amp):
        out = backbone(images)
    out.float().mean().backward()
    return {"step": watch.lap()}


def check_agreement(
    method: SelectiveContrastive, plain: PlainSelectiveContrastive, batch: Batch
) -> None:
    """Check that both sides give the same loss, gradient and candidates.

    Raises:
        SystemExit: If they differ.
    """
    embeddings, reference = _with_gradient(batch), _with_gradient(batch)
    losses = method.loss(embeddings, batch.index, batch.camids)
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()  # type: ignore[no-untyped-call]
    features, parts = reference.global_features.cpu(), _parts(reference).cpu()
    index = batch.index.cpu()
    distance = plain.distance(features.detach(), parts.detach(), batch.camids.cpu())
    positives, negatives = plain.select(distance, index)
    plain_loss = plain.loss(features, parts, positives, negatives)
    plain_loss.backward()  # type: ignore[no-untyped-call]
    got, want = embeddings.global_features.grad, reference.global_features.grad
    assert got is not None
    assert want is not None
    chosen = method._positive_index
    assert chosen is not None
    loss_error = abs(loss.item() - plain_loss.item())
    gradient_error = ((got - want).norm() / want.norm()).item()
    same = (chosen.cpu() == positives).float().mean().item()
    print(
        f"agreement with the plain code: loss {loss_error:.1e}, gradient "
        f"{gradient_error:.1e} (relative), same positives {same:.2%}"
    )
    if loss_error > 1e-4 or gradient_error > 1e-3 or same < 0.99:
        raise SystemExit("the two sides do not compute the same step")


def interleave(
    sides: dict[str, Callable[[], Seconds]], repeats: int
) -> dict[str, list[Seconds]]:
    """Run the sides interleaved, after one unmeasured turn.

    Args:
        sides: Functions to time, by name.
        repeats: Number of measured turns.

    Returns:
        The timings of each side, one entry per turn.
    """
    results: dict[str, list[Seconds]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            gc.collect()
            seconds = run()
            if turn:
                results[name].append(seconds)
    return results


def median_of(results: list[Seconds], key: str) -> float:
    """Return the median over turns of one timing."""
    return statistics.median(result[key] for result in results)


def ratio_of(above: list[Seconds], below: list[Seconds]) -> Seconds:
    """Compare two sides turn by turn.

    Returns:
        Median, smallest and largest of the ratios of one turn.
    """
    ratios = [a["step"] / b["step"] for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def measure(
    arguments: argparse.Namespace, num_images: int, backbone: nn.Module | None
) -> dict[str, Any]:
    """Measure all sides at one bank size.

    Args:
        arguments: Command-line arguments.
        num_images: Bank rows M.
        backbone: Backbone to compare the step with, or None.

    Returns:
        Medians in seconds, and ratios with their spread.
    """
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    method = make_method(num_images, arguments.bank_dtype, device, generator)
    batch = make_batch(method, arguments.batch_size, generator)
    sides = {
        "package": lambda: time_package_step(method, batch),
        "phases": lambda: time_package_phases(method, batch),
    }
    if not arguments.skip_plain:
        memory = method.memory
        assert memory.part_bank is not None
        # Copies: both sides write their banks.
        banks = [memory.global_bank, memory.part_bank, memory.mixture_bank]
        copies = [bank.detach().float().to("cpu", copy=True) for bank in banks]
        plain = PlainSelectiveContrastive(
            copies[0], copies[1], copies[2], method._bank_camids.cpu(), PlainSettings()
        )
        del copies, banks
        if arguments.bank_dtype == "float32":
            check_agreement(method, plain, batch)
        sides["plain"] = lambda: time_plain_step(plain, batch)
    if backbone is not None:
        images = torch.randn(arguments.batch_size, 3, *IMAGE_SIZE, device=device)
        sides["backbone"] = lambda: time_backbone(backbone, images, arguments.amp)
    results = interleave(sides, arguments.repeats)
    row: dict[str, Any] = {
        "num_images": num_images,
        "package": median_of(results["package"], "step"),
        "phases": {phase: median_of(results["phases"], phase) for phase in PHASES},
    }
    if "plain" in results:
        row["plain"] = median_of(results["plain"], "step")
        row["plain_phases"] = {p: median_of(results["plain"], p) for p in PHASES}
        row["speedup"] = ratio_of(results["plain"], results["package"])
    if "backbone" in results:
        row["backbone"] = median_of(results["backbone"], "step")
        row["ratio_to_backbone"] = ratio_of(results["package"], results["backbone"])
    if arguments.crossover:
        row["crossover"] = measure_crossover(method, batch, arguments.repeats)
    return row


def measure_crossover(
    method: SelectiveContrastive, batch: Batch, repeats: int
) -> dict[str, Any]:
    """Time loss and backward with gathered rows and with the full product, interleaved.

    Args:
        method: Method with its banks.
        batch: Batch of the loss.
        repeats: Number of measured turns.

    Returns:
        Medians of both variants, and the bank rows per candidate at which their cost would
        be equal (the cost of the product is proportional to the bank).
    """
    # The variant cannot be chosen by an argument, only by the limits of the module.
    kept = (
        loss_module._rows_per_candidate,
        loss_module._MAX_GATHERED_VALUES,
        loss_module._MAX_DOUBLE_VALUES,
    )
    loss_module._MAX_GATHERED_VALUES, loss_module._MAX_DOUBLE_VALUES = 2**40, 0

    def timed(rows_per_candidate: float) -> Seconds:
        loss_module._rows_per_candidate = lambda batch_size: rows_per_candidate
        return {"step": time_package_phases(method, batch)["loss+backward"]}

    results = interleave(
        {"gather": lambda: timed(0), "dense": lambda: timed(2**40)}, repeats
    )
    (
        loss_module._rows_per_candidate,
        loss_module._MAX_GATHERED_VALUES,
        loss_module._MAX_DOUBLE_VALUES,
    ) = kept
    ratio = ratio_of(results["gather"], results["dense"])
    candidates = 1 + NUM_NEIGHBORS + NUM_NEGATIVES
    return {
        "gather": median_of(results["gather"], "step"),
        "dense": median_of(results["dense"], "step"),
        "rows_per_candidate": ratio["median"] * method.num_images / candidates,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Collect the hardware and versions that the results depend on."""
    machine: dict[str, Any] = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
        machine["cuda"] = torch.version.cuda
    return machine


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def print_row(row: dict[str, Any]) -> None:
    """Print the results of one bank size."""
    print(f"\nM = {row['num_images']:,}: one step outside the backbone")
    print(f"  package   {1e3 * row['package']:10.1f} ms")
    for side in ("plain", "backbone"):
        if side in row:
            print(f"  {side:<9} {1e3 * row[side]:10.1f} ms")
    if "speedup" in row:
        speedup = row["speedup"]
        print(
            f"  {speedup['median']:.1f} times faster than the plain code "
            f"({speedup['min']:.1f}..{speedup['max']:.1f})"
        )
    if "ratio_to_backbone" in row:
        ratio = row["ratio_to_backbone"]
        print(
            f"  {ratio['median']:.2%} of the backbone's forward and backward "
            f"({ratio['min']:.2%}..{ratio['max']:.2%})"
        )
    print(f"  {'phase':<14} {'package':>10}" + f" {'plain':>10}" * ("plain_phases" in row))
    for phase in PHASES:
        line = f"  {phase:<14} {1e3 * row['phases'][phase]:7.1f} ms"
        if "plain_phases" in row:
            line += f" {1e3 * row['plain_phases'][phase]:7.1f} ms"
        print(line)
    if "crossover" in row:
        crossover = row["crossover"]
        print(
            f"  loss+backward: gathered {1e3 * crossover['gather']:.1f} ms, full product "
            f"{1e3 * crossover['dense']:.1f} ms; equal at about "
            f"{crossover['rows_per_candidate']:.0f} rows per candidate"
        )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--num-images", type=int, nargs="+", default=[12936, 100000], help="bank rows M"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="images B in a batch")
    parser.add_argument(
        "--bank-dtype", default="float32", choices=("float32", "float16", "bfloat16")
    )
    parser.add_argument("--repeats", type=int, default=5, help="measured turns")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0: torch's own"
    )
    parser.add_argument(
        "--amp", action="store_true", help="run the backbone under autocast"
    )
    parser.add_argument("--skip-backbone", action="store_true")
    parser.add_argument("--skip-plain", action="store_true")
    parser.add_argument(
        "--crossover", action="store_true", help="also time both variants of the logits"
    )
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and optionally write the results."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    machine = describe_machine(device)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    sizes = {
        "batch_size": arguments.batch_size,
        "C": GLOBAL_DIM,
        "S": NUM_PARTS,
        "K": NUM_NEIGHBORS,
        "N": NUM_NEGATIVES,
        "bank_dtype": arguments.bank_dtype,
        "repeats": arguments.repeats,
    }
    print(", ".join(f"{key} {value}" for key, value in sizes.items()))
    backbone = None if arguments.skip_backbone else make_backbone(device)
    rows = []
    for num_images in arguments.num_images:
        rows.append(measure(arguments, num_images, backbone))
        print_row(rows[-1])
        gc.collect()
    if arguments.output:
        report = {"machine": machine, "sizes": sizes, "results": rows}
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
