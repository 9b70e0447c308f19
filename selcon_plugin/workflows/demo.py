"""``selcon demo``: train on synthetic persons without labels in minutes on a CPU.

The demo renders synthetic persons in several cameras, evaluates ImageNet features, trains
without identities, evaluates again, and writes result images and a report. An interrupted
run resumes.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from selcon_plugin.config.checks import flatten_config, value_of
from selcon_plugin.config.demo import Demo, Ranking
from selcon_plugin.config.files import builtin_config
from selcon_plugin.config.host import Host
from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.engine.progress import duration
from selcon_plugin.engine.threads import reserve_cpu_core
from selcon_plugin.hosts import DEFAULT_HOST, get_host, quiet_import
from selcon_plugin.io.atomic import make_folder, write_atomically
from selcon_plugin.io.output_files import check_output_folder
from selcon_plugin.io.plain_yaml import read_settings
from selcon_plugin.io.streams import is_terminal
from selcon_plugin.report import finish_run
from selcon_plugin.report.sheets import loss_curve, ranked_sheet
from selcon_plugin.workflows.logs import quiet_logging
from selcon_plugin.workflows.terminal import echo

__all__ = ["run_demo"]

logger = logging.getLogger(__name__)

_CONFIG = "SyntheticPersons/scl.yml"
_SETTINGS = "demo.yaml"  # settings with which the run in a folder was started
_LOG = "log.txt"
_GAIN = "gain.json"  # metrics before and after, for the reader: it is not read back
# The demo's own files; --fresh removes only these and the files of the host.
_RUN_FILES = (
    *(_SETTINGS, _LOG, "results.json", _GAIN, "ranked.png", "loss.png", "report.html"),
    *("images.json", "embedding.npz", "ranked.json"),
)
_METRIC_NAMES = ("mAP", "Rank-1", "Rank-5", "mINP")
_NUM_QUERIES_SHOWN = 6
_MAX_RENDERING_PROCESSES = 4


def run_demo(
    output: str | Path = "logs/demo",
    *,
    epochs: int | None = None,
    fresh: bool = False,
    data_root: str = "",
    options: Sequence[str] = (),
) -> None:
    """Render data, train, evaluate before and after training, and draw the results.

    Args:
        output: Folder of the run; an interrupted run resumes.
        epochs: Epochs to train; None for those of the config.
        fresh: Whether to delete the run in the folder and start over.
        data_root: Folder of the data sets; empty for FASTREID_DATASETS.
        options: ``KEY VALUE`` pairs of the config; they override all others.

    Raises:
        ValueError: If a setting is wrong, or the folder contains a run with other settings.
        RunStopped: If a signal stopped the training; it is a ``SystemExit``.
    """  # noqa: DOC502  (raised by the functions called here)
    if epochs is not None and epochs < 1:
        raise ValueError(f"--epochs must be 1 or more, got {epochs}")
    if data_root:
        os.environ["FASTREID_DATASETS"] = str(Path(data_root).expanduser())
    with quiet_import():
        host = get_host(DEFAULT_HOST)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        overrides = host.overrides(output=str(output), device=device, epochs=epochs)
        config_file = builtin_config(_CONFIG)
        cfg = host.load_config(config_file, options, overrides=overrides)
    demo = host.demo(cfg)
    demo.test_set  # noqa: B018  (it raises if there is no test set)
    # The options may set another folder.
    chosen = value_of(cfg, host.run_keys.output)
    named = "--output" if chosen == str(output) else host.run_keys.output
    folder = make_folder(check_output_folder(named, chosen)).resolve()
    if fresh:
        _remove_run(folder, demo)
    with quiet_logging(folder / _LOG), reserve_cpu_core():
        _check_settings(folder, cfg, demo, begun=host.run_files.begun)
        logger.info("Running with full config:\n%s", cfg)
        _run(host, demo, folder, num_epochs=value_of(cfg, host.run_keys.epochs))


def _run(host: Host, demo: Demo, output: Path, *, num_epochs: int) -> None:
    """Run the steps of the demo."""
    started = time.monotonic()
    echo("[1/5] Data")
    _render_data(demo)
    echo("[2/5] Evaluation of ImageNet features before training")
    before = demo.rank_untrained()
    echo(f"      {_summary(before)}")
    done = demo.epochs_trained
    if done == num_epochs:
        echo("[3/5] Training was finished earlier; --fresh starts over")
    else:
        first = f", resumed at epoch {done + 1}" if done else ""
        echo(f"[3/5] Training without labels, {num_epochs} epochs{first}")
    demo.train()
    echo("[4/5] Evaluation of the trained model")
    after = demo.rank_trained()
    echo(f"      {_summary(after)}")
    echo("[5/5] Result images and report")
    pictures = _draw_pictures(output, before, after, demo)
    gain = {"before": before.metrics, "after": after.metrics}
    write_atomically(json.dumps(gain, indent=2) + "\n", output / _GAIN)
    demo.write_results(after.metrics)
    finish_run(output, host)
    echo(f"\n{_table(before.metrics, after.metrics)}\n")
    echo(f"Ranked results  {pictures[0]}")
    echo(f"Loss curve      {pictures[1]}")
    echo(f"Report          {output / 'report.html'}")
    echo(f"Model, logs     {output}")
    echo(f"\nTotal time: {duration(time.monotonic() - started)}.")


def _render_data(demo: Demo) -> None:
    """Render the data if it does not exist."""
    if demo.data is None:
        return
    root, spec = demo.data
    folder = root / spec.folder_name
    if not folder.is_dir():
        count = spec.num_train_images + spec.num_test_images
        echo(f"      rendering {count} images ...")
    processes = min(os.cpu_count() or 1, _MAX_RENDERING_PROCESSES)
    generate_synthetic_persons(
        root, spec, num_workers=processes, progress=is_terminal(sys.stderr)
    )
    echo(
        f"      {spec.num_train_images} training images, {spec.num_test_images} test "
        f"images of other persons, {spec.num_cameras} cameras:\n      {folder}"
    )


def _check_settings(output: Path, cfg: Any, demo: Demo, *, begun: str) -> None:
    """Record the settings of a new run, or compare them with those of an earlier one.

    Raises:
        ValueError: If the folder contains a run with other settings.
    """
    content = flatten_config(yaml.safe_load(cfg.dump()))
    settings = {"data": demo.data_name, **content}
    settings = {k: v for k, v in settings.items() if not k.startswith(demo.free_keys)}
    file = output / _SETTINGS
    if not file.exists():
        if (output / begun).exists():
            raise ValueError(
                f"{output} contains a run that the demo did not start: choose another "
                "--output"
            )
        write_atomically(yaml.safe_dump(settings), file)
        return
    earlier = read_settings(file)
    changed = sorted(
        key for key in {*settings, *earlier} if settings.get(key) != earlier.get(key)
    )
    if changed:
        named = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise ValueError(
            f"{output} contains a run with other settings ({named}): add --fresh to delete "
            "it and start over, or choose another --output"
        )


def _remove_run(output: Path, demo: Demo) -> None:
    """Remove the files of an earlier demo from its folder."""
    if not (output / _SETTINGS).exists():
        return
    for pattern in (*demo.run_files, *_RUN_FILES):
        for file in output.glob(pattern):
            file.unlink()


def _draw_pictures(
    output: Path, before: Ranking, after: Ranking, demo: Demo
) -> tuple[Path, Path]:
    """Draw ranked results before and after training, and the loss curve."""
    steps_per_epoch, warmup_steps = demo.schedule
    # The queries are evenly spaced, so that they cannot be cherry-picked.
    spread = np.linspace(0, len(after.query) - 1, _NUM_QUERIES_SHOWN).round().astype(int)
    ranked = ranked_sheet(
        output / "ranked.png",
        after.query,
        after.gallery,
        {"before": before.distance, "after": after.distance},
        queries=np.unique(spread).tolist(),
    )
    curve = loss_curve(
        output / demo.metrics_file,
        output / "loss.png",
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps,
    )
    return ranked, curve


def _table(before: dict[str, float], after: dict[str, float]) -> str:
    """Format the metrics before and after training, and the gain."""
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


def _summary(evaluation: Ranking) -> str:
    return ", ".join(
        f"{name} {evaluation.metrics[name]:.1f} %" for name in ("mAP", "Rank-1")
    )
