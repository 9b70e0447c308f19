"""``selcon demo``: from nothing to a model trained without labels, in minutes, on a CPU.

Draws people under several cameras, measures what ImageNet features know about them, trains
on them without identities, measures again, and leaves pictures of what was learned. A run
that was stopped goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from torch import nn

from selcon_plugin.config.checks import flatten_config
from selcon_plugin.config.loading import builtin_config
from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.engine.progress import on_terminal
from selcon_plugin.engine.stopping import RunStopped
from selcon_plugin.engine.threads import reserve_cpu_core
from selcon_plugin.hosts import load_config
from selcon_plugin.report.sheets import loss_curve, ranked_sheet
from selcon_plugin.runs.ranked import LabeledImages

logger = logging.getLogger(__name__)

# FastReID is imported inside the functions: it reads FASTREID_DATASETS when it is.

_SETTINGS = "demo.yaml"  # what the run in a folder was begun with
_METRICS = "metrics.json"  # FastReID's
_LOG = "log.txt"
_GAIN = "gain.json"  # metrics before and after
# What a run leaves behind, for --fresh to remove; nothing else is touched.
_RUN_FILES = (
    *("model_*.pth", "model_*.pth.partial", "last_checkpoint*", "config.yaml"),
    *(_METRICS, _LOG, "events.out.tfevents.*", _SETTINGS),
    *("results.json", "gain.json", "ranked.png", "loss.png", "report.html"),
    *("images.json", "embedding.npz", "ranked.json"),
)
# Settings that may differ between the parts of one run.
_FREE_KEYS = ("OUTPUT_DIR", "MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "TEST.")
_METRIC_NAMES = ("mAP", "Rank-1", "Rank-5", "mINP")
_NUM_QUERIES_SHOWN = 6
_MAX_DRAWING_PROCESSES = 4


@dataclass(frozen=True)
class _Evaluation:
    """What FastReID's evaluator says of a model.

    Attributes:
        metrics: Percentages by FastReID's names.
        distance: Query to gallery, shape ``(Q, G)``.
        query: The Q queries.
        gallery: The G gallery images.
    """

    metrics: dict[str, float]
    distance: NDArray[np.float32]
    query: LabeledImages
    gallery: LabeledImages


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Args:
        argv: Arguments after ``selcon demo``; those of the process by default.

    Returns:
        Exit status: 0, or 130 after Ctrl-C and 143 after SIGTERM.
    """
    args = _parser().parse_args(argv)
    if args.data_root:
        os.environ["FASTREID_DATASETS"] = str(Path(args.data_root).expanduser())
    cfg = _config(args)
    output = Path(cfg.OUTPUT_DIR).resolve()
    output.mkdir(parents=True, exist_ok=True)
    if args.fresh:
        _remove_run(output)
    try:
        with _log_into(output / _LOG), reserve_cpu_core():
            _run(cfg, output)
    except (KeyboardInterrupt, RunStopped) as stop:
        _say("\nStopped. The same command goes on.")
        return stop.code if isinstance(stop, RunStopped) else 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="selcon demo",
        description="Draw people seen by several cameras, train on them without identity "
        "labels, and show what was learned. A run that was stopped goes on.",
    )
    parser.add_argument(
        "--output", default="logs/demo", metavar="FOLDER", help="default: logs/demo"
    )
    parser.add_argument("--epochs", type=int, metavar="N", help="epochs to train")
    parser.add_argument(
        "--fresh", action="store_true", help="begin anew, forgetting the run in FOLDER"
    )
    parser.add_argument(
        "--data-root",
        default="",
        metavar="FOLDER",
        help="where the data is drawn; default: FASTREID_DATASETS, else ./datasets",
    )
    parser.add_argument(
        "opts", metavar="KEY VALUE", nargs=argparse.REMAINDER, help="config options"
    )
    return parser


def _config(args: argparse.Namespace) -> Any:
    """Read the demo's config; options of the command line come last and win."""
    options = ["OUTPUT_DIR", args.output]
    options += ["MODEL.DEVICE", "cuda" if torch.cuda.is_available() else "cpu"]
    if args.epochs is not None:
        if args.epochs < 1:
            raise ValueError(f"--epochs must be 1 or more, got {args.epochs}")
        options += ["SOLVER.MAX_EPOCH", str(args.epochs)]
    with warnings.catch_warnings():
        # On its first import FastReID says that its ranking is not compiled: it will be.
        warnings.filterwarnings("ignore", message="Cython .*evaluation")
        cfg = load_config(
            builtin_config("SyntheticPersons/scl.yml"), [*options, *args.opts]
        )
    if len(cfg.DATASETS.TESTS) != 1:
        raise ValueError(
            f"the demo needs one test set, DATASETS.TESTS is {cfg.DATASETS.TESTS}"
        )
    return cfg


def _run(cfg: Any, output: Path) -> None:
    """Go through the steps of the demo."""
    from selcon_plugin.fastreid_ext.results import write_results

    started = time.monotonic()
    _check_settings(output, cfg)
    _say("[1/5] Data")
    _draw_data(cfg)
    logger.info("Running with full config:\n%s", cfg)
    _say("[2/5] What ImageNet features know, without any training")
    before = _evaluate(cfg, _plain_model(cfg), output / _LOG)
    _say(f"      {_summary(before)}")
    trainer = _train(cfg)
    _say("[4/5] What the trained model knows")
    after = _evaluate(cfg, trainer.model, output / _LOG)
    _say(f"      {_summary(after)}")
    _say("[5/5] Pictures")
    steps_per_epoch = trainer.iters_per_epoch
    warmup_steps = cfg.MODEL.SELCON.WARMUP_EPOCHS * steps_per_epoch
    pictures = _draw_pictures(output, before, after, steps_per_epoch, warmup_steps)
    gain = {"before": before.metrics, "after": after.metrics}
    (output / _GAIN).write_text(json.dumps(gain, indent=2) + "\n")
    write_results(trainer, {cfg.DATASETS.TESTS[0]: after.metrics})
    _say(f"\n{_table(before.metrics, after.metrics)}\n")
    _say(f"Ranked results  {pictures[0]}")
    _say(f"Loss curve      {pictures[1]}")
    _say(f"Report          {output / 'report.html'}")
    _say(f"Model, logs     {output}")
    _say(f"\nThis took {_duration(time.monotonic() - started)}.")


def _draw_data(cfg: Any) -> None:
    """Draw the data if it is absent."""
    if "SyntheticPersons" not in (*cfg.DATASETS.NAMES, *cfg.DATASETS.TESTS):
        return
    from selcon_plugin.fastreid_ext.datasets import dataset_root, synthetic_persons_spec

    spec = synthetic_persons_spec(cfg)
    folder = Path(dataset_root()).resolve() / spec.folder_name
    if not folder.is_dir():
        _say(f"      drawing {spec.num_train_images + spec.num_test_images} pictures ...")
    processes = min(os.cpu_count() or 1, _MAX_DRAWING_PROCESSES)
    generate_synthetic_persons(
        folder.parent, spec, num_workers=processes, progress=sys.stderr.isatty()
    )
    _say(
        f"      {spec.num_train_images} images to train on, {spec.num_test_images} of "
        f"other people to test on, {spec.num_cameras} cameras:\n      {folder}"
    )


def _check_settings(output: Path, cfg: Any) -> None:
    """Note what the run is begun with, or compare with what it was begun with.

    Raises:
        ValueError: If the folder holds a run that was begun otherwise.
    """
    from selcon_plugin.fastreid_ext.datasets import synthetic_persons_spec

    # The folder's name holds the version of what draws the data.
    data = synthetic_persons_spec(cfg).folder_name
    settings = {"data": data, **flatten_config(yaml.safe_load(cfg.dump()))}
    settings = {k: v for k, v in settings.items() if not k.startswith(_FREE_KEYS)}
    file = output / _SETTINGS
    if not file.exists():
        if (output / "last_checkpoint").exists():
            raise ValueError(
                f"{output} holds a run that is not the demo's: choose another --output"
            )
        partial = file.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(settings))
        partial.replace(file)
        return
    earlier = yaml.safe_load(file.read_text()) or {}
    changed = sorted(
        key for key in {*settings, *earlier} if settings.get(key) != earlier.get(key)
    )
    if changed:
        named = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise ValueError(
            f"{output} holds a run with other settings ({named}): add --fresh to forget it "
            "and begin anew, or choose another --output"
        )


def _remove_run(output: Path) -> None:
    """Remove what an earlier demo left in its folder."""
    if not (output / _SETTINGS).exists():
        return
    for pattern in _RUN_FILES:
        for file in output.glob(pattern):
            file.unlink()


def _plain_model(cfg: Any) -> nn.Module:
    """Build FastReID's own model on the same backbone: pooled features, nothing learned."""
    from fastreid.modeling import build_model

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = "Baseline"
    cfg.MODEL.HEADS.NAME = "EmbeddingHead"
    cfg.MODEL.HEADS.EMBEDDING_DIM = 0  # no projection
    cfg.MODEL.HEADS.WITH_BNNECK = False
    cfg.MODEL.HEADS.NUM_CLASSES = 1  # of the classifier, which evaluation does not use
    model: nn.Module = build_model(cfg)
    return model


def _train(cfg: Any) -> Any:
    """Train without labels, or finish what was begun; return the trainer."""
    from selcon_plugin.fastreid_ext import SelConTrainer

    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TESTS = ()  # it is evaluated afterwards
    trainer = SelConTrainer(cfg)
    trainer.resume_or_load(resume=True)
    if trainer.start_epoch >= trainer.max_epoch:
        _say("[3/5] Training was finished earlier; --fresh would train anew")
    else:
        first = f", from epoch {trainer.start_epoch + 1} on" if trainer.start_epoch else ""
        _say(f"[3/5] Training without labels, {trainer.max_epoch} epochs{first}")
        with trainer.meter.running():
            trainer.train()
    for file in Path(cfg.OUTPUT_DIR).glob("model_[0-9]*.pth"):
        file.unlink()  # model_final.pth holds all of it
    return trainer


def _evaluate(cfg: Any, model: nn.Module, log: Path) -> _Evaluation:
    """Measure a model with FastReID's evaluator; keep the distances it ranked by."""
    from fastreid.evaluation import inference_on_dataset
    from fastreid.utils.compute_dist import build_dist

    from selcon_plugin.fastreid_ext import SelConTrainer

    with _terminal_into(log):  # the first evaluator compiles its ranking
        loader, evaluator = SelConTrainer.build_evaluator(cfg, cfg.DATASETS.TESTS[0])
    metrics = inference_on_dataset(
        model, loader, evaluator, flip_test=cfg.TEST.FLIP.ENABLED
    )
    features = torch.cat([batch["feats"] for batch in evaluator._predictions])
    num_query: int = evaluator._num_query
    items = loader.dataset.img_items
    return _Evaluation(
        {name: float(value) for name, value in metrics.items()},
        build_dist(features[:num_query], features[num_query:], cfg.TEST.METRIC),
        _labeled(items[:num_query]),
        _labeled(items[num_query:]),
    )


def _labeled(items: Sequence[tuple[str, int, int]]) -> LabeledImages:
    paths, pids, camids = zip(*items, strict=True)
    return LabeledImages(paths, np.array(pids), np.array(camids))


def _draw_pictures(
    output: Path,
    before: _Evaluation,
    after: _Evaluation,
    steps_per_epoch: int,
    warmup_steps: int,
) -> tuple[Path, Path]:
    """Draw ranked results before and after training, and the loss curve."""
    # Evenly spread over all queries, so that nobody can pick the nice ones.
    spread = np.linspace(0, len(after.query) - 1, _NUM_QUERIES_SHOWN).round().astype(int)
    ranked = ranked_sheet(
        output / "ranked.png",
        after.query,
        after.gallery,
        {"before": before.distance, "after": after.distance},
        queries=np.unique(spread).tolist(),
    )
    curve = loss_curve(
        output / _METRICS,
        output / "loss.png",
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
    )
    return ranked, curve


def _table(before: dict[str, float], after: dict[str, float]) -> str:
    """Lay out both rows and the gain."""
    gain = {name: after[name] - before[name] for name in _METRIC_NAMES}
    lines = [f"{'':28}" + "".join(f"{name:>9}" for name in _METRIC_NAMES)]
    for label, row, form in (
        ("before: ImageNet features", before, "9.1f"),
        ("after: trained, no labels", after, "9.1f"),
        ("gain", gain, "+9.1f"),
    ):
        lines.append(
            f"{label:28}" + "".join(f"{row[name]:{form}}" for name in _METRIC_NAMES)
        )
    return "\n".join(lines)


def _summary(evaluation: _Evaluation) -> str:
    return ", ".join(
        f"{name} {evaluation.metrics[name]:.1f} %" for name in ("mAP", "Rank-1")
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextlib.contextmanager
def _log_into(file: Path) -> Iterator[None]:
    """Write what is logged into a file; to the terminal warnings, and progress."""
    to_file = logging.FileHandler(file)
    form = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
    to_file.setFormatter(logging.Formatter(form))
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setFormatter(logging.Formatter("      %(levelname)s: %(message)s"))
    to_terminal.setLevel(logging.WARNING)
    handlers: dict[str, list[logging.Handler]] = {
        "fastreid": [to_file, to_terminal],
        "selcon_plugin": [to_file, to_terminal],
        "selcon_plugin.engine.progress": [to_file],
        "py.warnings": [to_file],  # from libraries: nothing the reader could mend
    }
    if not on_terminal():  # where there are no bars
        lines = logging.StreamHandler(sys.stderr)
        lines.setFormatter(logging.Formatter("      %(message)s"))
        handlers["selcon_plugin.engine.progress"].append(lines)
    loggers = [logging.getLogger(name) for name in handlers]
    earlier = [(log.handlers, log.level, log.propagate) for log in loggers]
    for log in loggers:
        log.handlers, log.propagate = handlers[log.name], False
        log.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for log, (old_handlers, level, propagate) in zip(loggers, earlier, strict=True):
            log.handlers, log.propagate = old_handlers, propagate
            log.setLevel(level)
        to_file.close()


@contextlib.contextmanager
def _terminal_into(file: Path) -> Iterator[None]:
    """Write what this process and its children print into a file, compilers included."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    try:
        with file.open("ab") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
