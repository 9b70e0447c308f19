"""Kill training runs repeatedly, resume them, and compare them with uninterrupted ones.

A training process (``selcon train``) on a tiny network and tiny data, in FastReID and in
torchreid, is ended

* by SIGKILL at a random time;
* by SIGKILL inside a function: extraction, clustering, rebuilding and updating of banks,
  teacher, optimizer step, writing of a checkpoint, writing of the last checkpoint's name,
  reading of a checkpoint, evaluation. It dies after a random number of Python lines there;
* by SIGKILL when a random fraction of a checkpoint's bytes is written;
* by SIGTERM and SIGINT at a random time, which must end it with status 143 or 130;

and occasionally the newest checkpoint is truncated at a random position before the run is
resumed. Each process is resumed with the same command until its run is complete. Then the
last checkpoint (weights, banks, labels, optimizer, schedule) and the evaluation must be
bit-identical to those of an uninterrupted run.

    python tools/faults/kill_and_resume.py                      all cases
    python tools/faults/kill_and_resume.py --kills 6 --cases SelConCluster torchreid/SpCL
    python tools/faults/kill_and_resume.py --report report.md   and report.json

The hosts are imported once and each training process is forked from there, which avoids the
time of the imports. The script runs only on POSIX systems.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import inspect
import io
import json
import mmap
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# One thread gives a fixed order of sums, and a fork loses no thread.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

EPOCHS = 3
KILLS_PER_CASE = 7
_MOST_LINES = 3000
_STOP_STATUSES = {signal.SIGTERM: 143, signal.SIGINT: 130}
_CLUSTERING = {"eps": 0.7, "min_samples": 2, "k1": 8, "k2": 3}
_SPEC = {
    "num_train_ids": 8,
    "num_test_ids": 4,  # FastReID needs 10 gallery images per query
    "images_per_id": 4,
    "num_cameras": 3,
    "num_distractors": 3,
}
_FASTREID = {
    "MODEL.META_ARCHITECTURE": "SelCon",
    "MODEL.DEVICE": "cpu",
    "MODEL.BACKBONE.NAME": "build_timm_backbone",
    "MODEL.BACKBONE.TIMM_NAME": "test_resnet",
    "MODEL.SELCON.NUM_PARTS": 2,
    "INPUT.SIZE_TRAIN": [64, 32],
    "INPUT.SIZE_TEST": [64, 32],
    "INPUT.REA.ENABLED": True,
    "DATASETS.NAMES": ("SyntheticPersons",),
    "DATASETS.TESTS": ("SyntheticPersons",),
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.OPT": "Adam",
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.IMS_PER_BATCH": 8,
    "SOLVER.MAX_EPOCH": EPOCHS,
    "SOLVER.WARMUP_ITERS": 3,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TEST.EVAL_PERIOD": EPOCHS,
}
_TORCHREID = {
    "use_gpu": False,
    "model.name": "timm:test_resnet",
    "model.pretrained": False,
    "data.sources": ["syntheticpersons"],
    "data.targets": ["syntheticpersons"],
    "data.height": 64,
    "data.width": 32,
    "data.workers": 0,
    "data.transforms": ["random_flip", "random_crop", "random_erase"],
    "train.optim": "adam",
    "train.lr": 0.001,
    "train.max_epoch": EPOCHS,
    "train.batch_size": 8,
    "train.lr_scheduler": "cosine",
    "test.batch_size": 16,
    "selcon.num_parts": 2,
}
_SCL = {"num_neighbors": 3, "num_negatives": 16, "warmup_epochs": 1}
# By case: host, method, options of the run and its method. All but one use clustering.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SelectiveContrastive": ("fastreid", "SelectiveContrastive", _SCL),
    "ClusterContrast": ("fastreid", "ClusterContrast", {"cluster_update": "hard"}),
    "SelConCluster": ("fastreid", "SelConCluster", {"outlier_ratio": 0.5}),
    "SpCL": ("fastreid", "SpCL", {}),
    "O2CAP with teacher": ("fastreid", "O2CAP", {"ema_decay": 0.9}),
    "torchreid/SelectiveContrastive": ("torchreid", "SelectiveContrastive", _SCL),
    "torchreid/ClusterContrast with teacher": (
        "torchreid",
        "ClusterContrast",
        {"ema_decay": 0.9, "micro_batches": 2},
    ),
    "torchreid/SpCL": ("torchreid", "SpCL", {}),
}

CHECKPOINT_BYTES = "checkpoint, some bytes"
# Announced functions by place, as (module, attribute path).
_PLACES: dict[str, tuple[tuple[str, str], ...]] = {
    "extraction": (
        ("fastreid_ext.embedding", "extract_embeddings"),
        ("torchreid_ext.engine", "extract_embeddings"),
    ),
    "clustering": (("engine.run", "label_images"),),
    "bank update": (("engine.network", "EmbeddingNetwork.update_banks"),),
    "teacher": (("engine.network", "EmbeddingNetwork.update_teacher"),),
    "checkpoint": (
        ("fastreid_ext.checkpoint", "save_atomically"),
        ("torchreid_ext.checkpoints", "save_atomically"),
    ),
    "note of the last": (("fastreid_ext.checkpoint", "write_atomically"),),
    "reading back": (
        ("fastreid_ext.checkpoint", "SelConCheckpointer._resume"),
        ("torchreid_ext.engine", "ImageSelConEngine.resume"),
    ),
    "evaluation": (
        ("fastreid_ext.trainer", "SelConTrainer.test"),
        ("torchreid_ext.engine", "ImageSelConEngine._evaluate"),
    ),
}
# By place: the last call that may be targeted. Functions that write files are preferred.
_AIMS = {
    "extraction": 1,
    "clustering": 1,
    "bank rebuild": 1,
    "bank update": 6,
    "teacher": 6,
    "optimizer step": 6,
    "checkpoint": 2,
    CHECKPOINT_BYTES: 2,
    "note of the last": 2,
    "reading back": 1,
    "evaluation": 1,
}
_WEIGHTS = [1, 3, 2, 3, 1, 1, 4, 4, 1, 1, 1]


class Fault(NamedTuple):
    """Planned end of a process.

    Attributes:
        kind: ``"aimed"``, ``"timed"``, or ``"none"``.
        place: Targeted function of an aimed fault.
        call: Number of the targeted call.
        amount: Number of lines, or fraction of the bytes or of an uninterrupted run's time.
        signal: Signal that ends the process.
        damage: Fraction to which the newest checkpoint is truncated first; 1 for intact.
    """

    kind: str
    place: str = ""
    call: int = 1
    amount: float = 0.0
    signal: int = signal.SIGKILL
    damage: float = 1.0


def draw_fault(rng: random.Random, number: int) -> Fault:
    """Sample the n-th fault of a case: aimed faults, with timed ones in between."""
    damage = rng.uniform(0.0, 0.99) if rng.random() < 0.2 else 1.0
    if number % 3 == 2:
        ending = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        return Fault("timed", amount=rng.random(), signal=ending, damage=damage)
    (place,) = rng.choices(list(_AIMS), _WEIGHTS)
    amount = rng.random()
    if place != CHECKPOINT_BYTES:
        amount = _MOST_LINES**amount  # half of the faults are in the first 50 lines
    return Fault("aimed", place, rng.randint(1, _AIMS[place]), amount, damage=damage)


# --- inside a training process ------------------------------------------------------------


class Announcer:
    """Reporter of the current function to the harness, which also triggers the fault.

    Args:
        board: Memory shared with the harness.
        fault: Planned end of the process.
    """

    def __init__(self, board: mmap.mmap, fault: Fault) -> None:
        self._board = board
        self._fault = fault
        self._calls: Counter[str] = Counter()
        self._lines = 0

    def watch(self, owner: Any, name: str, place: str) -> None:
        """Replace a function by one that reports its name."""
        plain = inspect.getattr_static(owner, name)
        is_class_method = isinstance(plain, classmethod)
        function = plain.__func__ if is_class_method else plain

        @functools.wraps(function)
        def announcing(*args: Any, **kwargs: Any) -> Any:
            with self._inside(place) as is_aim:
                result = function(*args, **kwargs)
                if is_aim:  # the function had fewer lines
                    die()
                return result

        setattr(owner, name, classmethod(announcing) if is_class_method else announcing)

    @contextlib.contextmanager
    def _inside(self, place: str) -> Iterator[bool]:
        outer = read_board(self._board)
        write_board(self._board, place)
        self._calls[place] += 1
        is_aim = (place, self._calls[place]) == (self._fault.place, self._fault.call)
        if is_aim:
            sys.settrace(self._count_lines)
        yield is_aim
        sys.settrace(None)
        write_board(self._board, outer)

    def _count_lines(self, _frame: Any, event: str, _arg: Any) -> Any:
        if event == "line":
            self._lines += 1
            if self._lines >= self._fault.amount:
                die()
        return self._count_lines

    def watch_bytes(self) -> None:
        """Make the writing of a checkpoint end after some of its bytes."""
        save = torch.save

        def save_some(data: Any, stream: Any) -> None:
            self._calls[CHECKPOINT_BYTES] += 1
            if self._calls[CHECKPOINT_BYTES] < self._fault.call:
                save(data, stream)
                return
            write_board(self._board, CHECKPOINT_BYTES)
            whole = io.BytesIO()
            save(data, whole)
            stream.write(whole.getvalue()[: int(self._fault.amount * whole.tell())])
            stream.flush()
            die()

        torch.save = save_some


def die() -> None:
    """Kill this process like the out-of-memory killer of the system."""
    os.kill(os.getpid(), signal.SIGKILL)


def read_board(board: mmap.mmap) -> str:
    """Return the last place that a process has announced."""
    return board[:].rstrip(b"\0").decode()


def write_board(board: mmap.mmap, place: str) -> None:
    """Announce a place."""
    board[:] = place.encode().ljust(len(board), b"\0")


def train(command: Sequence[str], method: str, fault: Fault, board: mmap.mmap) -> int:
    """Run ``selcon`` with announced functions, in the forked process."""
    from selcon_plugin.cli.main import main
    from selcon_plugin.methods import method_class

    announcer = Announcer(board, fault)
    for place, functions in _PLACES.items():
        for module, path in functions:
            *owners, name = path.split(".")
            owner: Any = importlib.import_module(f"selcon_plugin.{module}")
            for part in owners:
                owner = getattr(owner, part)
            announcer.watch(owner, name, place)
    announcer.watch(method_class(method), "prepare", "bank rebuild")
    announcer.watch(torch.optim.Adam, "step", "optimizer step")
    if fault.place == CHECKPOINT_BYTES:
        announcer.watch_bytes()
    return main(command)


# --- the harness --------------------------------------------------------------------------


class Ending(NamedTuple):
    """End of a process: exit status (negative for a signal), place, and seconds."""

    status: int
    place: str
    seconds: float


@dataclass
class Result:
    """Result of a case.

    Attributes:
        kills: Processes ended by SIGKILL, by place.
        stops: Processes ended by SIGTERM or SIGINT, by status.
        runs: Number of interrupted runs compared with the uninterrupted one.
        processes: Number of started processes.
        damaged: Number of truncated checkpoints.
        problems: Differences, and unexpected ends of processes.
    """

    kills: Counter[str] = field(default_factory=Counter)
    stops: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    processes: int = 0
    damaged: int = 0
    problems: list[str] = field(default_factory=list)


class Case:
    """Test case of a host and a method, with the folder of its runs.

    Args:
        name: Key of :data:`CASES`.
        folder: Folder of the runs.
        data_root: Folder of the synthetic data.
    """

    def __init__(self, name: str, folder: Path, data_root: Path) -> None:
        self.name = name
        self.host, self.method, self._options = CASES[name]
        self._folder = folder
        self._data_root = data_root
        self._board = mmap.mmap(-1, 64)
        self.result = Result()

    def _command(self, folder: Path) -> list[str]:
        torchreid = self.host == "torchreid"
        prefix = "selcon." if torchreid else "MODEL.SELCON."
        case = str.lower if torchreid else str.upper
        options: dict[str, Any] = dict(_TORCHREID if torchreid else _FASTREID)
        own = {"method": self.method, **self._options}
        options |= {prefix + case(key): value for key, value in own.items()}
        if self.method != "SelectiveContrastive":
            node = prefix + case("clustering") + "."
            options |= {node + case(key): value for key, value in _CLUSTERING.items()}
        spec = "synthetic_persons." if torchreid else "DATASETS.SYNTHETIC_PERSONS."
        options |= {spec + case(key): value for key, value in _SPEC.items()}
        options["data.save_dir" if torchreid else "OUTPUT_DIR"] = str(folder)
        if torchreid:
            options["data.root"] = str(self._data_root)
        arguments = [str(part) for option in options.items() for part in option]
        return ["train", "--host", self.host, "--resume", *arguments]

    def start(self, folder: Path, fault: Fault, run_seconds: float) -> Ending:
        """Train in a separate process until it ends, or its fault ends it."""
        folder.mkdir(parents=True, exist_ok=True)
        write_board(self._board, "start, or between")
        self.result.processes += 1
        started = time.monotonic()
        process = os.fork()
        if process == 0:
            self._be_trained(folder, fault)
        if fault.kind == "timed":
            time.sleep(fault.amount * run_seconds)
            os.kill(process, fault.signal)
        _, status = os.waitpid(process, 0)
        seconds = time.monotonic() - started
        code = os.waitstatus_to_exitcode(status)
        return Ending(code, read_board(self._board), seconds)

    def _be_trained(self, folder: Path, fault: Fault) -> None:
        """Train in this process, which has just been forked; never returns."""
        status = 1
        try:
            # Background jobs of a shell start without this handler.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with open(folder / "console.txt", "ab", buffering=0) as console:
                os.dup2(console.fileno(), 1)
                os.dup2(console.fileno(), 2)
            status = train(self._command(folder), self.method, fault, self._board)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def run(self, num_kills: int, rng: random.Random) -> None:
        """Train an uninterrupted run, then interrupted ones, and compare them."""
        whole = self._folder / "whole"
        ending = self.start(whole, Fault("none"), 0.0)
        if ending.status:
            self._problem(
                f"the uninterrupted run ended with {ending.status}: {console(whole)}"
            )
            return
        faults = (draw_fault(rng, number) for number in range(100 * num_kills))
        ended = 0
        while ended < num_kills and not self.result.problems:
            broken = self._folder / f"broken{self.result.runs}"
            ended += self._break(broken, faults, num_kills - ended, ending.seconds)
            self.result.runs += 1
            for difference in compare(whole, broken, self.host):
                self._problem(f"{broken}: {difference}")
            if not self.result.problems:
                shutil.rmtree(broken)

    def _break(
        self, folder: Path, faults: Iterator[Fault], wanted: int, run_seconds: float
    ) -> int:
        """Train a run to completion with interruptions; return their number."""
        ended = 0
        while True:
            fault = next(faults) if ended < wanted else Fault("none")
            if fault.damage < 1:
                self.result.damaged += truncate_newest(folder, self.host, fault.damage)
            ending = self.start(folder, fault, run_seconds)
            if ending.status == 0:
                return ended
            ended += 1
            if not self._count(ending, fault):
                self._problem(f"{fault} ended with {ending}: {console(folder)}")
                return ended

    def _count(self, ending: Ending, fault: Fault) -> bool:
        """Count an end; return whether it was the planned one."""
        if ending.status == -signal.SIGKILL == -fault.signal:
            self.result.kills[ending.place] += 1
            return fault.kind != "none"
        # Python's default handling, before there is anything to save.
        early = (-signal.SIGTERM, -signal.SIGINT)
        stopped = _STOP_STATUSES.get(signal.Signals(fault.signal))
        if ending.status == stopped or ending.status in early:
            name = signal.Signals(fault.signal).name
            when = "before training" if ending.status in early else f"status {stopped}"
            self.result.stops[f"{name}, {when}"] += 1
            return True
        return False

    def _problem(self, text: str) -> None:
        self.result.problems.append(text)
        print(f"{self.name}: {text}", flush=True)


def console(folder: Path) -> str:
    """Return the last lines of a run's output."""
    lines = (folder / "console.txt").read_text(errors="replace").splitlines()
    return " / ".join(lines[-3:])


def checkpoints(folder: Path, host: str) -> list[Path]:
    """Return a run's checkpoints, newest last."""
    pattern = "model/model*.pth.tar*" if host == "torchreid" else "model_*.pth"
    files = [file for file in folder.glob(pattern) if file.suffix != ".partial"]
    return sorted(files, key=lambda file: file.stat().st_mtime_ns)


def truncate_newest(folder: Path, host: str, fraction: float) -> int:
    """Truncate the newest checkpoint if there is another one; return 1 if it was done."""
    files = checkpoints(folder, host)
    if len(files) < 2:
        return 0
    os.truncate(files[-1], int(fraction * files[-1].stat().st_size))
    return 1


def compare(whole: Path, broken: Path, host: str) -> list[str]:
    """List the differences between the final states of two runs."""
    name = f"model/model.pth.tar-{EPOCHS}" if host == "torchreid" else "model_final.pth"
    try:
        ends = [torch.load(run / name, weights_only=True) for run in (whole, broken)]
    except Exception as error:  # of whatever kind a damaged file raises
        return [f"the last checkpoint cannot be read: {error}"]
    results = [json.loads((run / "results.json").read_text()) for run in (whole, broken)]
    for key in ("metrics", "num_clusters", "steps"):
        for end, result in zip(ends, results, strict=True):
            end[f"results.json {key}"] = result[key]
    partial = [str(file) for file in broken.rglob("*.partial")]
    return list(differences(*ends)) + [f"{file} was not removed" for file in partial]


def differences(first: Any, second: Any, name: str = "") -> Iterator[str]:
    """Yield the entries in which two checkpoints differ, except for measurements."""
    if name.endswith("meter"):
        return
    if isinstance(first, dict):
        for key in first.keys() | second.keys():
            yield from differences(first.get(key), second.get(key), f"{name}.{key}")
    elif isinstance(first, (list, tuple)):
        for i, pair in enumerate(zip(first, second, strict=True)):
            yield from differences(*pair, f"{name}.{i}")
    elif isinstance(first, torch.Tensor):
        if not torch.equal(first, second):
            yield f"{name} differs"
    elif first != second:
        yield f"{name} is {second}, not {first}"


# --- the report ---------------------------------------------------------------------------


def report_of(results: dict[str, Result], seconds: float, seed: int) -> dict[str, Any]:
    """Collect the results of all cases."""
    kills: Counter[str] = sum((result.kills for result in results.values()), Counter())
    stops: Counter[str] = sum((result.stops for result in results.values()), Counter())
    return {
        "kills": sum(kills.values()),
        "kills_by_place": dict(kills.most_common()),
        "stops": sum(stops.values()),
        "stops_by_signal": dict(stops.most_common()),
        "damaged_checkpoints": sum(result.damaged for result in results.values()),
        "processes": sum(result.processes for result in results.values()),
        "runs_compared": sum(result.runs for result in results.values()),
        "problems": [p for result in results.values() for p in result.problems],
        "seconds": round(seconds),
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cases": {
            name: {
                "kills": sum(result.kills.values()),
                "stops": sum(result.stops.values()),
                "damaged": result.damaged,
                "runs": result.runs,
                "problems": len(result.problems),
            }
            for name, result in results.items()
        },
    }


def as_markdown(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        f"{report['kills']} kills and {report['stops']} stops by SIGTERM or SIGINT in "
        f"{report['runs_compared']} runs, {report['damaged_checkpoints']} truncated "
        f"checkpoints; {len(report['problems'])} runs differ from the uninterrupted one or "
        "ended unexpectedly.",
        "",
        f"{report['processes']} processes, {report['seconds']} s, seed {report['seed']}, "
        f"Python {report['python']}, torch {report['torch']}, CPU.",
        "",
        "| case | kills | stops | truncated | runs compared | problems |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {name} | {' | '.join(str(value) for value in case.values())} |"
        for name, case in report["cases"].items()
    ]
    for title, key in (("killed in", "kills_by_place"), ("stopped by", "stops_by_signal")):
        lines += ["", f"| {title} | processes |", "| --- | --- |"]
        lines += [f"| {name} | {count} |" for name, count in report[key].items()]
    lines += [f"\n* {problem}" for problem in report["problems"]]
    return "\n".join(lines) + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--kills", type=int, default=KILLS_PER_CASE, help="kills and stops of each case"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    parser.add_argument("--report", type=Path, help="Markdown; also written as .json")
    return parser.parse_args(arguments)


def import_hosts(data_root: Path) -> None:
    """Import everything once that every training process needs."""
    os.environ["FASTREID_DATASETS"] = str(data_root)
    torch.set_num_threads(1)
    from selcon_plugin.datasets import SyntheticPersonsSpec, generate_synthetic_persons

    generate_synthetic_persons(data_root, SyntheticPersonsSpec(**_SPEC))
    # Both hosts are needed: announced functions are in both.
    for module in (
        *("selcon_plugin.cli.main", "selcon_plugin.torchreid_ext.train"),
        *("selcon_plugin.fastreid_ext.trainer", "timm", "torch.utils.tensorboard"),
        *("sklearn.cluster", "sklearn.metrics"),
    ):
        importlib.import_module(module)
    with contextlib.suppress(ImportError):  # numba may be missing
        importlib.import_module("selcon_plugin.clustering.compiled.jaccard_kernels")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; return 1 if there was a problem."""
    args = parse(arguments)
    started = time.monotonic()
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        import_hosts(folder / "data")
        for name in args.cases:
            case = Case(name, folder / name.replace("/", " "), folder / "data")
            results[name] = case.result
            # A separate random stream makes a case independent of the others.
            case.run(args.kills, random.Random(f"{args.seed} {name}"))
            kills, stops = sum(case.result.kills.values()), sum(case.result.stops.values())
            print(
                f"{name}: {kills} kills, {stops} stops, {case.result.runs} runs, "
                f"{len(case.result.problems)} problems, {time.monotonic() - started:.0f} s",
                flush=True,
            )
    report = report_of(results, time.monotonic() - started, args.seed)
    text = as_markdown(report)
    print(f"\n{text}")
    if args.report:
        args.report.write_text(text)
        args.report.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    return int(bool(report["problems"]))


if __name__ == "__main__":
    sys.exit(main())
