"""Benchmark clustering: neighbors, Jaccard distance and DBSCAN, compared with dense code.

The script times the clustering of one epoch (nearest neighbors, k-reciprocal Jaccard
distance, DBSCAN) against

* the dense definition (``plain_jaccard.py``) and scikit-learn's DBSCAN on its matrix,
* FastReID's ``compute_jaccard_distance`` and the same DBSCAN, and
* only the product of all features with all features in float32, the minimum cost of exact
  dense code.

All implementations run interleaved (A B C A B C ...), so that a busy machine slows all of
them; the script prints medians, and ratios with the smallest and largest ratio of one turn.
The extra memory of each implementation is measured in a separate process: the peak minus
the memory in use after the features were created. Dense implementations are skipped if they
would not fit into memory.

The features are synthetic, but overlap like those of a half-trained network: the printed
adjusted mutual information (AMI) of clusters and identities lies between 0.6 and 0.9.

    python tools/benchmark/bench_clustering.py --output results.json
    python tools/benchmark/bench_clustering.py --sizes 12936x2048 --repeats 5
    python tools/benchmark/bench_clustering.py --device cuda --sizes 1000000x256
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_mutual_info_score
from torch import Tensor

from bench_step import Stopwatch, describe_machine, median_of, ratio_of
from plain_jaccard import dense_jaccard
from selcon_plugin.clustering import (
    dbscan_labels,
    jaccard_distance,
    nearest_neighbors,
)

PHASES = ("neighbors", "jaccard", "dbscan")
IMAGES_PER_IDENTITY = 17
NUM_CAMERAS = 6
CAMERA = 0.5  # length of a camera offset relative to that of an identity
AMI_SAMPLE = 12_936  # the index takes minutes on the clusters of 100,000 images
Labels = NDArray[np.int64]
Seconds = dict[str, float]


class Settings(NamedTuple):
    """Settings of the distance and of DBSCAN, as in most published methods."""

    k1: int = 30
    k2: int = 6
    eps: float = 0.6
    min_samples: int = 4


class Outcome(NamedTuple):
    """Times of one clustering, and its labels if there are any."""

    seconds: Seconds
    labels: Labels | None = None


Side = Callable[[Tensor, Settings], Outcome]


def make_features(num_images: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sample unit features: a common mean plus identity, camera and image offsets.

    Variances decrease along the dimensions as 1 / rank, like those of trained features.

    Args:
        num_images: Number of images M.
        dim: Feature dimension C.
        seed: Random seed.

    Returns:
        Features ``(M, C)`` and identities ``(M,)``.
    """
    generator = torch.Generator().manual_seed(seed)
    # More identities need less noise for the same overlap: determined empirically.
    noise = min(1.3, 1.2 * (12_936 / num_images) ** 0.15) * (dim / 2048) ** 0.1
    spread = torch.arange(1, dim + 1).float().rsqrt()
    spread /= spread.norm()
    mean = torch.randn(dim, generator=generator).abs() / dim**0.5
    num_identities = max(1, num_images // IMAGES_PER_IDENTITY)
    identities = torch.randn(num_identities, dim, generator=generator) * spread
    cameras = torch.randn(NUM_CAMERAS, dim, generator=generator) * spread * CAMERA
    pids = torch.randint(num_identities, (num_images,), generator=generator)
    camids = torch.randint(NUM_CAMERAS, (num_images,), generator=generator)
    features = torch.empty(num_images, dim)
    for start in range(0, num_images, 4096):  # in chunks: no second copy of the features
        rows = slice(start, start + 4096)
        own = torch.randn(len(pids[rows]), dim, generator=generator) * spread
        quality = noise * (0.6 + 0.8 * torch.rand(len(own), 1, generator=generator))
        whole = mean + identities[pids[rows]] + cameras[camids[rows]] + quality * own
        features[rows] = F.normalize(whole, dim=1)
    return features, pids


def run_package(features: Tensor, settings: Settings) -> Outcome:
    """Cluster with the package."""
    watch = Stopwatch(features.device)
    neighbors = nearest_neighbors(features, settings.k1)
    seconds = {"neighbors": watch.lap()}
    distance = jaccard_distance(
        features,
        k1=settings.k1,
        k2=settings.k2,
        max_distance=settings.eps,
        neighbors=neighbors,
    )
    seconds["jaccard"] = watch.lap()
    labels = dbscan_labels(distance, settings.eps, settings.min_samples)
    seconds["dbscan"] = watch.lap()
    return Outcome({**seconds, "step": sum(seconds.values())}, labels)


def run_plain(features: Tensor, settings: Settings) -> Outcome:
    """Cluster by the dense definition."""
    watch = Stopwatch(features.device)
    distance = dense_jaccard(features.cpu(), settings.k1, settings.k2)
    seconds = {"distance": watch.lap()}
    labels = _dense_dbscan(distance, settings)
    seconds["dbscan"] = watch.lap()
    return Outcome({**seconds, "step": sum(seconds.values())}, labels)


def run_fastreid(features: Tensor, settings: Settings) -> Outcome:
    """Cluster with FastReID's distance: faiss on the CPU, or products on a GPU."""
    importlib.import_module("selcon_plugin.compat").prepare_fastreid()
    module: Any = importlib.import_module("fastreid.utils.compute_dist")
    search = 0 if features.is_cuda else 3
    watch = Stopwatch(features.device)
    distance = module.compute_jaccard_distance(
        features, k1=settings.k1, k2=settings.k2, search_option=search
    )
    seconds = {"distance": watch.lap()}
    labels = _dense_dbscan(distance, settings)
    seconds["dbscan"] = watch.lap()
    return Outcome({**seconds, "step": sum(seconds.values())}, labels)


def _dense_dbscan(distance: NDArray[np.float32], settings: Settings) -> Labels:
    clusters = DBSCAN(
        eps=settings.eps, min_samples=settings.min_samples, metric="precomputed", n_jobs=-1
    )
    return clusters.fit_predict(distance)  # type: ignore[no-any-return]


def run_product(features: Tensor, settings: Settings) -> Outcome:
    """Multiply all features with all features, and discard the products."""
    del settings
    rows = max(1, min(4096, 2**28 // len(features)))
    products = features.new_empty(rows, len(features))
    watch = Stopwatch(features.device)
    for piece in torch.split(features, rows):
        torch.mm(piece, features.T, out=products[: len(piece)])
    return Outcome({"step": watch.lap()})


SIDES: dict[str, Side] = {
    "package": run_package,
    "product": run_product,
    "plain": run_plain,
    "fastreid": run_fastreid,
}


def sides_for(num_images: int, skipped: list[str]) -> list[str]:
    """Return the sides to measure; dense ones need free memory for three matrices."""
    needed = 3.3 * 4 * num_images**2
    fits = needed < 0.9 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    names = [name for name in SIDES if fits or name in ("package", "product")]
    return [name for name in names if name not in skipped]


def warm_up(names: list[str], device: torch.device, settings: Settings) -> None:
    """Load libraries and compiled code before the first measured turn."""
    features, _ = make_features(3000, 64)
    for name in names:
        SIDES[name](features.to(device), settings)


def take_turns(
    names: list[str], features: Tensor, settings: Settings, repeats: int
) -> tuple[dict[str, list[Seconds]], dict[str, Labels]]:
    """Run the sides interleaved.

    Args:
        names: Names of the sides.
        features: Shape ``(M, C)``, on the device.
        settings: Settings of the clustering.
        repeats: Number of turns.

    Returns:
        The timings of each side, one entry per turn, and its labels.
    """
    results: dict[str, list[Seconds]] = {name: [] for name in names}
    labels: dict[str, Labels] = {}
    for _ in range(repeats):
        for name in names:
            gc.collect()
            outcome = SIDES[name](features, settings)
            results[name].append(outcome.seconds)
            if outcome.labels is not None:
                labels[name] = outcome.labels
    return results, labels


def check_agreement(labels: dict[str, Labels]) -> None:
    """Check that all sides find almost the same clusters.

    Products within float32 rounding of each other may be ordered differently, which can
    change the label of an image at the border of a cluster.

    Raises:
        SystemExit: If they differ.
    """
    first = labels.pop("package")
    for name, other in labels.items():
        pairs = len(set(zip(first.tolist(), other.tolist(), strict=True)))
        groups = max(len(set(first.tolist())), len(set(other.tolist())))
        print(f"  same clusters as {name}: {groups} groups, {pairs - groups} splits")
        if pairs > 1.02 * groups:
            raise SystemExit(f"package and {name} do not find the same clusters")


def describe_labels(labels: Labels, pids: Tensor) -> dict[str, float]:
    """Measure the difficulty of the features; AMI on at most ``AMI_SAMPLE`` images."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randperm(len(labels), generator=generator)[:AMI_SAMPLE].numpy()
    return {
        "ami": float(adjusted_mutual_info_score(pids.numpy()[sample], labels[sample])),
        "identities": len(pids.unique()),
        "clusters": int(labels.max()) + 1,
        "outlier_ratio": float((labels < 0).mean()),
    }


def measure(arguments: argparse.Namespace, num_images: int, dim: int) -> dict[str, Any]:
    """Measure all sides at one size."""
    device, settings = torch.device(arguments.device), Settings()
    names = sides_for(num_images, arguments.skip)
    features, pids = make_features(num_images, dim)
    warm_up(names, device, settings)
    results, labels = take_turns(names, features.to(device), settings, arguments.repeats)
    row: dict[str, Any] = {"num_images": num_images, "dim": dim}
    row.update(describe_labels(labels["package"], pids))
    row["phases"] = {phase: median_of(results["package"], phase) for phase in PHASES}
    row["seconds"] = {name: median_of(results[name], "step") for name in names}
    row["ratios"] = {
        name: ratio_of(results["package"], results[name])
        for name in names
        if name != "package"
    }
    print(f"\nM = {num_images:,}, C = {dim}")
    check_agreement(labels)
    del features
    gc.collect()
    if not arguments.skip_memory:
        measured = [name for name in names if name != "product"]
        row["extra_mib"] = {
            name: memory_of_child(name, num_images, dim, arguments) for name in measured
        }
    return row


def memory_of_child(
    name: str, num_images: int, dim: int, arguments: argparse.Namespace
) -> float:
    """Run one side in a separate process; return its extra memory in MiB."""
    command = [sys.executable, __file__, "--child", name, "--device", arguments.device]
    command += ["--sizes", f"{num_images}x{dim}", "--threads", str(arguments.threads)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(run.stdout.splitlines()[-1])


def run_child(arguments: argparse.Namespace) -> None:
    """Print the extra memory of one side: on the GPU if it runs there, or of the CPU."""
    device, settings = torch.device(arguments.device), Settings()
    warm_up([arguments.child], device, settings)
    ((num_images, dim),) = arguments.sizes
    features = make_features(num_images, dim)[0].to(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        SIDES[arguments.child](features, settings)
        print((torch.cuda.max_memory_allocated(device) - before) / 2**20)
        return
    _reset_memory_peak()
    before = _memory("VmRSS")
    SIDES[arguments.child](features, settings)
    print(_memory("VmHWM") - before)


def _reset_memory_peak() -> None:
    """Return freed memory to the system and reset the peak (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def _memory(field: str) -> float:
    """Return a memory field of this process in MiB; the peak so far outside Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    match = re.search(rf"{field}:\s+(\d+) kB", status.read_text(encoding="utf-8"))
    assert match
    return int(match[1]) / 2**10


def print_row(row: dict[str, Any]) -> None:
    """Print the results of one size."""
    print(
        f"  {row['clusters']} clusters of {row['identities']} identities, "
        f"{row['outlier_ratio']:.1%} outliers, AMI {row['ami']:.3f}"
    )
    for name, seconds in row["seconds"].items():
        line = f"  {name:<9} {seconds:9.2f} s"
        if name in row.get("extra_mib", {}):
            line += f"  {row['extra_mib'][name]:8.0f} MiB extra"
        if name in row["ratios"]:
            ratio = row["ratios"][name]
            line += (
                f"  ratio of the package {ratio['median']:.3f} "
                f"({ratio['min']:.3f}..{ratio['max']:.3f})"
            )
        print(line)
    phases = ", ".join(f"{name} {row['phases'][name]:.2f} s" for name in PHASES)
    print(f"  package: {phases}")


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``MxC``."""
    num_images, _, dim = text.partition("x")
    return int(num_images), int(dim)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--sizes",
        type=parse_size,
        nargs="+",
        default=[(3000, 2048), (12936, 2048), (32621, 2048), (100000, 512)],
        help="images x dimensions, as 12936x2048",
    )
    parser.add_argument("--repeats", type=int, default=3, help="measured turns")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads; 0: torch's own"
    )
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=list(SIDES)[1:], help="sides to skip"
    )
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--output", type=Path, help="write the results here as JSON")
    parser.add_argument("--child", choices=list(SIDES), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print, and optionally write the results."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.child:
        run_child(arguments)
        return
    machine = describe_machine(torch.device(arguments.device))
    for name in ("numpy", "scipy", "sklearn", "numba", "faiss"):
        machine[name] = importlib.import_module(name).__version__
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    settings = Settings()._asdict()
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    rows = []
    for num_images, dim in arguments.sizes:
        rows.append(measure(arguments, num_images, dim))
        print_row(rows[-1])
        gc.collect()
    if arguments.output:
        report = {
            "machine": machine,
            "settings": {**settings, "repeats": arguments.repeats},
            "results": rows,
        }
        arguments.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
