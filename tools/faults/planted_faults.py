"""Mutation test: plant faults in a copy of the package and check that the tests fail.

The faults below are realistic mistakes in a change. With most of them a run completes with
a plausible loss, and learns less or something else.

    python tools/faults/planted_faults.py                       # all of them
    python tools/faults/planted_faults.py --only momentum_side  # one
    python tools/faults/planted_faults.py --report docs/reliability/planted_faults.md

Exit status: 0 if every fault was caught, 1 if not.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("selcon_plugin", "tests", "configs", "conftest.py", "pyproject.toml")
FAILED = 1  # pytest: tests ran and some failed; 2 and above: they could not run


@dataclass(frozen=True)
class Fault:
    """Fault: a text that occurs once in a file, and its replacement.

    Attributes:
        name: Short name.
        effect: Effect on a run.
        file: Path inside the package.
        right: Original text.
        wrong: Replacement.
        tests: Arguments of pytest for the tests that should catch the fault.
    """

    name: str
    effect: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


MEMORY, CLUSTER_MEMORY = (
    ("tests/memory/test_tri_bank.py",),
    ("tests/memory/test_cluster.py",),
)
SELECTION, SAMPLERS = ("tests/test_selection.py",), ("tests/samplers",)
SELECTIVE_LOSS = ("tests/losses/test_selective_contrastive.py",)
CENTERING = ("tests/clustering/test_camera_centering.py",)
DATA = ("tests/fastreid_ext/test_data.py",)

FAULTS = (
    Fault(
        "momentum_side",
        "momentum weighs the new feature instead of the old row",
        "memory/writes.py",
        "torch.lerp(new, bank[targets].float(), momentum)",
        "torch.lerp(bank[targets].float(), new, momentum)",
        MEMORY,
    ),
    Fault(
        "row_not_normalized",
        "a written bank row loses its unit length",
        "memory/writes.py",
        "bank[targets] = F.normalize(mixed, dim=-1).to(bank.dtype)",
        "bank[targets] = mixed.to(bank.dtype)",
        MEMORY,
    ),
    Fault(
        "mixture_write_order",
        "the mixture bank is written from column 0 on, so that neighbors write last",
        "memory/tri_bank.py",
        "columns.flip(1).T.flatten()",
        "columns.T.flatten()",
        MEMORY,
    ),
    Fault(
        "cluster_label_shift",
        "images write the row of the next cluster",
        "memory/cluster.py",
        "rows = targets[clustered]\n",
        "rows = (targets[clustered] + 1) % len(self.bank)\n",
        CLUSTER_MEMORY,
    ),
    Fault(
        "outliers_write_a_row",
        "outliers write the last cluster's row",
        "memory/cluster.py",
        "clustered = (targets >= 0).nonzero()",
        "clustered = (targets >= -1).nonzero()",
        CLUSTER_MEMORY,
    ),
    Fault(
        "easiest_instead_of_hardest",
        "the hard update takes the image most similar to the row",
        "memory/cluster.py",
        "order = torch.argsort(similarity, stable=True)",
        "order = torch.argsort(-similarity, stable=True)",
        CLUSTER_MEMORY,
    ),
    Fault(
        "cameras_moved_apart",
        "centering moves the images of a camera away from those of the others",
        "clustering/camera_centering.py",
        "return (global_mean - means)",
        "return (means - global_mean)",
        CENTERING,
    ),
    Fault(
        "small_cameras_moved",
        "cameras with few images are centered too",
        "clustering/camera_centering.py",
        "large = (cameras >= 0) & (counts >= MIN_IMAGES_PER_CAMERA)",
        "large = cameras >= 0",
        CENTERING,
    ),
    Fault(
        "other_pairs_ignored",
        "cross-camera pairs are ignored, and camera-confounded pairs are not",
        "losses/selective_contrastive.py",
        "ignored_positive[:, None],\n",
        "~ignored_positive[:, None],\n",
        SELECTIVE_LOSS,
    ),
    Fault(
        "negatives_overlap_positives",
        "the furthest neighbor is a negative as well",
        "selection.py",
        "return positive_index, nearest[:, neighbors:]",
        "return positive_index, nearest[:, max(neighbors - 1, 0) :]",
        SELECTION,
    ),
    Fault(
        "own_row_competes",
        "an image's own row is chosen as its nearest neighbor",
        "selection.py",
        '    others = distance.scatter(1, index[:, None], float("inf"))\n    # topk',
        "    others = distance\n    # topk",
        SELECTION,
    ),
    Fault(
        "own_row_as_negative",
        "a random negative may be the image itself",
        "selection.py",
        "torch.where(is_own.any(dim=1), is_own.int().argmax(dim=1), count)",
        "torch.full_like(index, count)",
        SELECTION,
    ),
    Fault(
        "camera_penalty_sign",
        "the distance of images from the same camera decreases instead of increasing",
        "distance.py",
        "distance.add_(same, alpha=same_camera_penalty)",
        "distance.add_(same, alpha=-same_camera_penalty)",
        ("tests/test_distance.py",),
    ),
    Fault(
        "unknown_cameras_match",
        "images of unknown camera count as images of the same camera",
        "distance.py",
        "known = (camids >= 0)[:, None]",
        "known = (camids >= -1)[:, None]",
        ("tests/test_distance.py",),
    ),
    Fault(
        "temperature_multiplies",
        "similarities are multiplied by the temperature",
        "losses/selective_contrastive.py",
        "candidate_similarity(views, bank, candidates) / temperature",
        "candidate_similarity(views, bank, candidates) * temperature",
        SELECTIVE_LOSS,
    ),
    Fault(
        "neighbor_weight_not_shared",
        "every neighbor gets the weight meant for all of them",
        "losses/selective_contrastive.py",
        "neighbor_scale * (1.0 - self_weight) / (num_positives - 1)",
        "neighbor_scale * (1.0 - self_weight)",
        SELECTIVE_LOSS,
    ),
    Fault(
        "loss_writes_bank",
        "the loss writes the bank that it reads",
        "methods/cluster_contrast.py",
        '        return {"loss_cluster": loss}',
        "        self.memory.update(embeddings.global_features, self.labels[index])\n"
        '        return {"loss_cluster": loss}',
        ("tests/methods/test_all_methods.py", "-k", "reads and ClusterContrast"),
    ),
    Fault(
        "gather_dropped",
        "each process writes only its part of the batch, so the banks diverge",
        "distributed.py",
        "return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])",
        "return tensor",
        ("tests/test_distributed.py",),
    ),
    Fault(
        "uneven_ratio",
        "with an uneven batch a process uses the camera weights of other images",
        "losses/camera_weights.py",
        "weights = whole[shared[:, 2] == rank()]",
        "weights = whole[rank() * len(targets) :][: len(targets)]",
        ("tests/faults/test_uneven_shards.py",),
    ),
    Fault(
        "rank_slice",
        "every process trains on the first process's part of the batch",
        "samplers/stream.py",
        "first = self.rank * per_rank",
        "first = 0",
        SAMPLERS,
    ),
    Fault(
        "sampler_ignores_start",
        "a resumed run sees the first batches again",
        "samplers/stream.py",
        "        start = self.start\n",
        "        start = 0\n",
        SAMPLERS,
    ),
    Fault(
        "same_camera_first",
        "a cluster's images in a batch come from the anchor's camera",
        "samplers/planners.py",
        "(camids[candidates] != anchor_camera) & (anchor_camera >= 0)",
        "(camids[candidates] == anchor_camera) & (anchor_camera >= 0)",
        SAMPLERS,
    ),
    Fault(
        "half_list_off_by_one",
        "the half lists of the k-reciprocal expansion are one rank short",
        "clustering/jaccard.py",
        '"half": min(round(k1 / 2) + 1, width)',
        '"half": min(round(k1 / 2), width)',
        ("tests/clustering/test_jaccard.py", "-k", "loops and torch"),
    ),
    Fault(
        "eps_exclusive",
        "DBSCAN leaves out neighbors at exactly eps",
        "clustering/dbscan.py",
        "np.flatnonzero(distance.data <= float(eps))",
        "np.flatnonzero(distance.data < float(eps))",
        ("tests/clustering/test_dbscan.py",),
    ),
    Fault(
        "core_image_off_by_one",
        "DBSCAN does not count the image itself among its neighbors",
        "clustering/dbscan.py",
        "np.bincount(row, minlength=num_images) + 1 >= min_samples",
        "np.bincount(row, minlength=num_images) >= min_samples",
        ("tests/clustering/test_dbscan.py",),
    ),
    Fault(
        "teacher_decay_side",
        "the teacher takes over nearly all of the student at each step",
        "models/ema.py",
        "share = max(1.0 - self.decay, 1.0 / (self.step + 1))",
        "share = max(self.decay, 1.0 / (self.step + 1))",
        ("tests/models/test_ema.py",),
    ),
    Fault(
        "extraction_in_training_mode",
        "features for the banks use batch statistics",
        "engine/extraction.py",
        "    network.eval()\n    # The sizes",
        "    # The sizes",
        ("tests/faults/test_uneven_shards.py",),
    ),
    Fault(
        "unsorted_images",
        "the order of bank rows depends on the file system",
        "engine/images.py",
        "items = sorted(items, key=lambda item: item[0])",
        "items = list(items)",
        DATA,
    ),
    Fault(
        "identity_as_camera",
        "the method gets the identity instead of the camera",
        "engine/images.py",
        "self.camids = number_names([item[2] for item in items], unknown=UNKNOWN)",
        "self.camids = number_names([item[1] for item in items], unknown=UNKNOWN)",
        DATA,
    ),
    Fault(
        "augmentation_ignores_position",
        "an image is cropped and flipped the same way in every epoch",
        "engine/images.py",
        "np.random.SeedSequence((self.seed, position))",
        "np.random.SeedSequence((self.seed, 0))",
        DATA,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """Result of the tests with a planted fault.

    Attributes:
        fault: Planted fault.
        verdict: "caught", "missed", or "broken" if the tests could not run.
        test: First test that failed.
        seconds: Duration of the tests.
    """

    fault: Fault
    verdict: str
    test: str
    seconds: float


def copy_repository(folder: Path) -> None:
    """Copy the files that the tests need."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)


def preload() -> None:
    """Import the dependencies of the tests once for all of them."""
    for name in ("pytest", "torch", "scipy.sparse", "sklearn.cluster"):
        importlib.import_module(name)


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int, str, float]:
    """Run tests in a copy until the first failure, in a separate process.

    Args:
        folder: Folder of the copy.
        tests: Arguments of pytest.

    Returns:
        Pytest's exit status, its output, and seconds.

    Raises:
        RuntimeError: If the package is already imported, so the copy would not be used.
    """
    if "selcon_plugin" in sys.modules:
        raise RuntimeError("the package is already imported: run this as a program")
    log = folder / "output.txt"
    started = time.perf_counter()
    process = os.fork()
    if not process:
        _run_in_this_process(folder, tests, log)
    _, status = os.waitpid(process, 0)
    # A process ended by a signal has no exit status.
    code = os.waitstatus_to_exitcode(status)
    return abs(code), log.read_text(), time.perf_counter() - started


def _run_in_this_process(folder: Path, tests: tuple[str, ...], log: Path) -> None:
    """Run tests in a copy, and end the process."""
    import pytest

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)  # for processes that tests start
    # Bytecode files are compared by a time in seconds, which is too coarse here.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    with log.open("w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    os._exit(int(status))


def try_fault(folder: Path, fault: Fault) -> Outcome:
    """Plant a fault in a copy, run its tests, and remove the fault.

    Args:
        folder: Folder of the copy.
        fault: Fault to plant.

    Returns:
        The result of the tests.

    Raises:
        ValueError: If the text to replace does not occur exactly once.
    """
    file = folder / "selcon_plugin" / fault.file
    source = file.read_text()
    if source.count(fault.right) != 1:
        raise ValueError(
            f"{fault.name}: {fault.right!r} occurs {source.count(fault.right)} times in "
            f"{fault.file} and must occur once: adapt the fault to the code"
        )
    file.write_text(source.replace(fault.right, fault.wrong))
    try:
        status, output, seconds = run_tests(folder, fault.tests)
    finally:
        file.write_text(source)
    failed = re.search(r"^(?:FAILED|ERROR) \S+?([^/\s]+::[^\s\[]+)", output, re.MULTILINE)
    verdict = {0: "missed", FAILED: "caught"}.get(status, "broken")
    if "ERROR collecting" in output:  # with -x, the status equals that of a failed test
        verdict = "broken"
    return Outcome(fault, verdict, failed[1] if failed else "", seconds)


def check_unharmed(folder: Path, faults: tuple[Fault, ...]) -> None:
    """Check that the tests pass on the unchanged copy.

    Raises:
        RuntimeError: If the tests fail without a fault.
    """
    tests = dict.fromkeys(fault.tests for fault in faults)
    whole_files = tuple(name[0] for name in tests if len(name) == 1)
    chosen = [name for name in tests if len(name) > 1]
    for together in [whole_files, *chosen] if whole_files else chosen:
        status, output, _ = run_tests(folder, together)
        if status:
            raise RuntimeError(f"{' '.join(together)} fails without a fault:\n{output}")


def as_markdown(outcomes: list[Outcome]) -> str:
    """Format the report in Markdown."""
    caught = sum(outcome.verdict == "caught" for outcome in outcomes)
    lines = [
        "# Planted faults",
        "",
        "`python tools/faults/planted_faults.py` plants one fault at a time in a copy of",
        "the package and runs the tests that should catch it.",
        "",
        f"**{caught} of {len(outcomes)} caught** (Python {platform.python_version()}, "
        f"{platform.system()}).",
        "",
        "| fault | effect | file | verdict | first test to fail |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| `{o.fault.name}` | {o.fault.effect} | `{o.fault.file}` | {o.verdict} | "
        f"{f'`{o.test}`' if o.test else ''} |"
        for o in outcomes
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Plant the requested faults and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--report", type=Path, help="Markdown file to write")
    args = parser.parse_args(argv)
    faults = tuple(fault for fault in FAULTS if fault.name in args.only)
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_repository(folder)
        preload()
        check_unharmed(folder, faults)
        for fault in faults:
            outcomes.append(try_fault(folder, fault))
            done = outcomes[-1]
            print(
                f"{done.verdict:7} {fault.name} ({done.seconds:.0f} s) {done.test}",
                flush=True,
            )
    if args.report:
        args.report.write_text(as_markdown(outcomes))
    return int(any(outcome.verdict != "caught" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
