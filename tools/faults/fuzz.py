"""Random configs, JSON files and arguments: each command ends in success or in one line.

A case changes a copy of ``tests/old_runs`` and runs a command in this process. It must
succeed, or end with status 2 and one line on stderr. It must leave no traceback, and a
refused command must change no file. Training itself is replaced.

    python tools/faults/fuzz.py --minutes 10 --seed 1
    python tools/faults/fuzz.py --case 1234        # one case again, with its output

The same generator runs in the tests, with fixed seeds (tests/faults/test_fuzz.py).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OLD_RUNS = ROOT / "tests" / "old_runs"
SECONDS = 60  # of one case

TEXTS = [
    *("010", "1:30", "1e-3", "5e-1", "1_000", "0x10", ".5", "+5", "-1", "0", "1", "2.5"),
    *("inf", "nan", ".inf", "1e999", "9" * 30, "2024-01-31", "20240131", "0001"),
    *("yes", "off", "True", "y", "null", "~", "None", "none", "", "''", '""'),
    *("[1,2]", "(1,2)", "[1", "1]", "('a',)", "[a, b,]", "{a: 1}", "a: b", "- a", "[[1]]"),
    *("*x", "&x 1", "!!str 1", "!!python/object:os.system x", "|", ">", "%", "@a", "`a`"),
    *("\t1", "é", "٣", "日本", "a b", "/", ".", "..", "auto", "ClusterContrast", "DBSCAN"),
    *("x" * 300, "${HOME}", "# no", "1 # one", "'a", '"a', "\\", "\x07", "\u202e"),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2.5, 1e308, "", "x", "0001", [], {}, [1], {"a": 1}),
    *([[]], [None], 10**30, "2024", float("nan"), float("inf"), [[["a"]]], "\ud800"),
]
JUNK = [
    b"",
    b"\0",
    b"\xff\xfe",
    b"{",
    b"[]",
    b"null",
    b"3",
    b"\x80\x02}q\0.",
    b"PK\x03\x04",
]
KEYS = [
    *("SOLVER.MAX_EPOCH", "SOLVER.BASE_LR", "SOLVER.NESTEROV", "SOLVER.STEPS", "SOLVER"),
    *("MODEL.SELCON.METHOD", "MODEL.SELCON.TEMPERATURE", "MODEL.SELCON.NUM_PARTS"),
    *("MODEL.SELCON.CLUSTERING.EPS", "MODEL.SELCON.CLUSTERING.LABELER", "MODEL.DEVICE"),
    *("MODEL.SELCON.MAX_BAD_SHARE", "MODEL.SELCON.SEED", "MODEL.WEIGHTS", "OUTPUT_DIR"),
    *("INPUT.SIZE_TRAIN", "DATASETS.NAMES", "DATASETS.TESTS", "MODEL.HEADS.POOL_LAYER"),
    *("MODEL.BACKBONE.NAME", "MODEL.META_ARCHITECTURE", "MODEL.PIXEL_MEAN", "TEST.METRIC"),
    *("train.max_epoch", "train.lr", "selcon.method", "selcon.clustering.eps", "data.root"),
    *("model.name", "data.sources", "data.height", "selcon.pool", "test.ranks", "train"),
    *("SOLVER.MAX_EPOCHS", "solver.max_epoch", "_BASE_", "A", "", ".", "A.B", "1", "null"),
]
# Values that only cost time, or would start real work.
SLOW = {"9" * 30, "1_000"}
# What a run writes when it begins, before the last of its checks; and an index of the
# former format, which is converted when it is opened for writing.
_BEGUN = re.compile(
    r"log\.txt|config\.yaml|\.lock|adapt\.json|events\.out.*"
    r"|features-\d\.bin|images-\d\.jsonl|index\.json"
)


@dataclass
class Case:
    """A command in a changed copy of the old runs.

    Attributes:
        argv: Arguments of ``selcon``.
        changes: New content of files, by path.
    """

    argv: list[str]
    changes: dict[str, bytes] = field(default_factory=dict)


# --- generation ---------------------------------------------------------------------------


def draw_case(seed: int) -> Case:
    """Draw the case of a seed."""
    rng = random.Random(seed)
    draw = rng.choice(
        [_config_case, _config_case, _option_case, _json_case, _argument_case]
    )
    return draw(rng)


def _config_case(rng: random.Random) -> Case:
    host = rng.choice(["fastreid", "torchreid"])
    source = rng.choice([f"{host}.yml", f"{host}/config.yaml"])
    text = (OLD_RUNS / source).read_text(encoding="utf-8")
    for _ in range(rng.randint(1, 2)):
        text = rng.choice(_EDITS)(rng, text)
    content = rng.choice(_ENCODINGS)(text) if rng.random() < 0.2 else text.encode()
    command = rng.choice(
        [
            ["train"],
            ["train"],
            ["train", "--host", host],
            ["eval"],
            ["extract", "--images", "data", "--output", "o.npz"],
            ["bench", "--output", "bench", "--seeds", "1"],
            ["cluster", "--images", "data", "--weights", _WEIGHTS[host]],
        ]
    )
    name = "--configs" if command[0] == "bench" else "--config-file"
    return Case([*command, name, "case.yml"], {"case.yml": content})


_WEIGHTS = {
    "fastreid": "fastreid/model_final.pth",
    "torchreid": "torchreid/model/model.pth.tar-2",
}


def _edited_lines(edit: Callable[[random.Random, list[str]], None]) -> Any:
    def apply(rng: random.Random, text: str) -> str:
        lines = text.splitlines()
        if lines:
            edit(rng, lines)
        return "\n".join(lines) + "\n"

    return apply


def _new_value(rng: random.Random, lines: list[str]) -> None:
    number = rng.randrange(len(lines))
    key, colon, _ = lines[number].partition(": ")
    if colon:
        lines[number] = f"{key}: {_text(rng)}"


def _twice(rng: random.Random, lines: list[str]) -> None:
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))


def _without(rng: random.Random, lines: list[str]) -> None:
    del lines[rng.randrange(len(lines))]


def _indented(rng: random.Random, lines: list[str]) -> None:
    number = rng.randrange(len(lines))
    lines[number] = rng.choice([" ", "\t", "    ", "- "]) + lines[number].lstrip(" ")


def _added(rng: random.Random, lines: list[str]) -> None:
    lines.insert(rng.choice([0, len(lines)]), f"{rng.choice(KEYS)}: {_text(rng)}")


def _characters(rng: random.Random, text: str) -> str:
    at = rng.randrange(len(text) + 1)
    return (
        text[:at] + rng.choice(["\0", "\t", ":", "{", "}", "'", "é", "\r"]) + text[at + 1 :]
    )


def _cut(rng: random.Random, text: str) -> str:
    return text[: rng.randrange(len(text) + 1)]


def _whole(rng: random.Random, _: str) -> str:
    return rng.choice([_text(rng), "", "[]", "- a\n- b\n", "---\n...\n", "{}"])


_EDITS: list[Callable[[random.Random, str], str]] = [
    _edited_lines(_new_value),
    _edited_lines(_new_value),
    _edited_lines(_new_value),
    _edited_lines(_twice),
    _edited_lines(_without),
    _edited_lines(_indented),
    _edited_lines(_added),
    _edited_lines(_added),
    _characters,
    _cut,
    _whole,
]
_ENCODINGS: list[Callable[[str], bytes]] = [
    lambda text: text.encode("utf-16"),
    lambda text: text.encode("utf-8-sig"),
    lambda text: text.encode("latin-1", "replace") + b"\xe9",
    lambda text: text.replace("\n", "\r\n").encode(),
]


def _text(rng: random.Random) -> str:
    return rng.choice([text for text in TEXTS if text not in SLOW])


def _option_case(rng: random.Random) -> Case:
    options = [
        word for _ in range(rng.randint(1, 2)) for word in (rng.choice(KEYS), _text(rng))
    ]
    if rng.random() < 0.1:
        options.pop()
    host = "torchreid" if options[0].islower() else "fastreid"
    command = rng.choice(
        [
            ["train", "--config-file", f"{host}.yml"],
            ["eval", "--config-file", f"{host}.yml"],
            ["cluster", "--images", "data", "--weights", _WEIGHTS[host]],
            ["adapt", "--images", "data", "--weights", _WEIGHTS[host], "--output", "a"],
            ["export", "--weights", _WEIGHTS[host], "--torchscript", "o.pt"],
            ["bench", "--configs", f"{host}.yml", "--output", "bench", "--seeds", "1"],
        ]
    )
    if command[0] == "cluster":
        names = ["eps", "min_samples", "k1", "k2", "k3", "graph_margin", "EPS"]
        options[::2] = [rng.choice(names) for _ in options[::2]]
    return Case([*command, *options])


def _json_case(rng: random.Random) -> Case:
    file, commands = rng.choice(_READ_BACK)
    old = (OLD_RUNS / file).read_bytes()
    if rng.random() < 0.25:
        content = rng.choice([*JUNK, old[: rng.randrange(len(old) + 1)], old + old])
    elif file.endswith(("l", "metrics.json")):
        lines = old.decode().splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(_changed(rng, json.loads(lines[number])))
        content = "\n".join(lines).encode()
    else:
        content = json.dumps(_changed(rng, json.loads(old))).encode()
    return Case(list(rng.choice(commands)), {file: content})


def _changed(rng: random.Random, value: Any) -> Any:
    """Return a JSON value in which one part is replaced or removed."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {name: entry for name, entry in value.items() if name != key}
        return {**value, key: _changed(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.85:
        at = rng.randrange(len(value))
        return [*value[:at], _changed(rng, value[at]), *value[at + 1 :]]
    return rng.choice(VALUES)


_QUERY = "data/synthetic_persons-5715b97e4c4f/query/0007_c1s1_000025_01.jpg"


def _of_run(host: str) -> list[list[str]]:
    return [
        ["report", host],
        ["report", "fastreid", "torchreid", "--output", "c.html"],
        ["train", "--resume", "--config-file", f"{host}.yml"],
    ]


_OF_INDEX = [
    ["search", _QUERY, "--index", "index", "--weights", _WEIGHTS["fastreid"]],
    ["index", "--index", "index", "--remove", "nothing*"],
    ["index", "--index", "index", "--add", "data", "--weights", _WEIGHTS["fastreid"]],
]
_READ_BACK = [
    *((f"{host}/{name}", _of_run(host))
      for host in ("fastreid", "torchreid")
      for name in ("results.json", "metrics.json", "ranked.json", "images.json")),
    ("index/index.json", _OF_INDEX),
    ("index/images-0.jsonl", _OF_INDEX),
    ("data/synthetic_persons-5715b97e4c4f/manifest.json",
     [["train", "--config-file", "fastreid.yml"]]),
]  # fmt: skip

_PATHS = [
    *("data", "fastreid", "index", "nowhere", "nowhere/x", "", ".", "/", "/dev/null"),
    *("fastreid.yml", "fastreid/config.yaml", "tiny_resnet.py", "case.yml", _QUERY),
    *(*_WEIGHTS.values(), "torchreid/features.npz", "fastreid/results.json", "a\nb"),
    *("\udcff", "x" * 300, "a/" * 200, "/proc/x", "é", "fastreid.yml/x"),
]


def _argument_case(rng: random.Random) -> Case:
    from selcon_plugin.cli.main import command_parsers

    parsers = command_parsers()
    name = rng.choice([n for n in parsers if n not in ("run", "demo", "doctor")])
    words = [name]
    actions = [a for a in parsers[name]._actions if a.dest not in ("help", "imports")]
    for action in actions:
        if action.required or rng.random() < 0.35:
            flag = [rng.choice(action.option_strings)] if action.option_strings else []
            values = [] if action.nargs == 0 else [_argument(rng, action)]
            if flag or action.nargs == "+":
                words += [*flag, *values]
    if rng.random() < 0.2:
        words.insert(rng.randrange(1, len(words) + 1), rng.choice(["--wrong", "-x", "--"]))
    return Case(words, {"case.yml": b"SOLVER: {MAX_EPOCH: 2}\n"})


def _argument(rng: random.Random, action: argparse.Action) -> str:
    if action.type is None or rng.random() < 0.5 or "file" in str(action.type):
        pool = [*_PATHS, *(action.choices or ())] if rng.random() < 0.8 else TEXTS
    else:
        pool = TEXTS
    return str(rng.choice([text for text in pool if text not in SLOW]))


# --- one case -----------------------------------------------------------------------------


class TrainingBeginsError(SystemExit):
    """End of a command that would train now; it counts as success."""

    def __init__(self) -> None:
        super().__init__(0)


def _begin_training(*_: object, **__: object) -> None:
    raise TrainingBeginsError


@contextlib.contextmanager
def training_replaced() -> Iterator[None]:
    """Replace the training by the end of the command, in both hosts and in the bench."""
    from selcon_plugin.datasets.synthetic import persons
    from selcon_plugin.fastreid_ext import SelConTrainer
    from selcon_plugin.torchreid_ext import ImageSelConEngine
    from selcon_plugin.workflows import bench

    _import_backbone()
    targets = [(SelConTrainer, "train"), (ImageSelConEngine, "train"), (bench, "_work")]
    targets.append((persons, "_fill"))  # rendering takes long
    earlier = [getattr(owner, name) for owner, name in targets]
    for owner, name in targets:
        setattr(owner, name, _begin_training)
    try:
        yield
    finally:
        for (owner, name), function in zip(targets, earlier, strict=True):
            setattr(owner, name, function)


def _import_backbone() -> None:
    """Register the network of the old runs."""
    if "tiny_resnet" not in sys.modules:
        file = OLD_RUNS / "tiny_resnet.py"
        spec = importlib.util.spec_from_file_location("tiny_resnet", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["tiny_resnet"] = module
        spec.loader.exec_module(module)


def prepare(folder: Path) -> None:
    """Copy the old runs into a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(OLD_RUNS, folder)
    for file in [*folder.rglob("*.json"), *folder.rglob("*.jsonl")]:
        file.write_text(file.read_text().replace("@FOLDER@", str(folder)))


def state_of(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def run_case(case: Case, folder: Path) -> str:
    """Run a case in a prepared folder, which is the current one.

    Args:
        case: The case.
        folder: Copy of the old runs; it is changed.

    Returns:
        Description of the fault; empty if there is none.
    """
    for name, content in case.changes.items():
        (folder / name).write_bytes(content.replace(b"@FOLDER@", os.fsencode(folder)))
    before = state_of(folder)
    out, err = io.StringIO(), io.StringIO()
    from selcon_plugin.cli.main import main

    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            status = main(case.argv)
    except BaseException:
        return f"raised:\n{traceback.format_exc()}"
    return _fault(status, out.getvalue(), err.getvalue(), before, state_of(folder))


def _fault(
    status: int, out: str, err: str, before: dict[str, bytes], after: dict[str, bytes]
) -> str:
    lines = err.splitlines()
    if "Traceback" in out + err:
        return f"traceback:\n{err}"
    if status == 0:
        return ""
    if status != 2:
        return f"status {status}:\n{err}"
    errors = [line for line in lines if ": error: " in line]
    if len(errors) != 1 or lines[-1] != errors[0]:
        return f"not one line:\n{err}"
    changed = sorted(
        name
        for name in {*before, *after}
        if before.get(name) != after.get(name) and not _BEGUN.fullmatch(Path(name).name)
    )
    return f"refused, but changed {changed[:5]}:\n{err}" if changed else ""


def run_seeds(
    seeds: Iterator[int], folder: Path, *, until: float
) -> Iterator[tuple[int, str]]:
    """Run cases until a time; yield the seed and the fault of each that has one."""
    home = Path.cwd()
    signal.signal(signal.SIGALRM, _hangs)
    with training_replaced():
        try:
            for seed in seeds:
                if time.monotonic() > until:
                    return
                prepare(folder)
                os.chdir(folder)
                signal.alarm(SECONDS)
                fault = run_case(draw_case(seed), folder)
                signal.alarm(0)
                if fault:
                    yield seed, fault
        finally:
            signal.alarm(0)
            os.chdir(home)


def _hangs(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Fuzz for some minutes and print the faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0, help="first seed")
    parser.add_argument("--case", type=int, help="run only this seed")
    args = parser.parse_args()
    found, count = 0, 0
    with tempfile.TemporaryDirectory() as place:
        os.environ["FASTREID_DATASETS"] = str(Path(place, "runs", "data"))
        os.environ["XDG_CACHE_HOME"] = str(Path(place, "cache"))
        if args.case is not None:
            print(draw_case(args.case))
        first = args.seed if args.case is None else args.case

        def seeds() -> Iterator[int]:
            nonlocal count
            for seed in range(first, first + (10**9 if args.case is None else 1)):
                count += 1
                yield seed

        until = time.monotonic() + 60 * args.minutes
        for seed, fault in run_seeds(seeds(), Path(place, "runs"), until=until):
            found += 1
            print(f"--- {seed}: {draw_case(seed).argv}\n{fault[-1500:]}", flush=True)
    print(f"{count} cases, {found} faults")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
