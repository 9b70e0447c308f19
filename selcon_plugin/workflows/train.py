"""Training and evaluation in any host, with a report of each trained run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selcon_plugin.config.host import Host
from selcon_plugin.config.host_data import Processes, RunResult
from selcon_plugin.config.importing import import_files
from selcon_plugin.hosts import DEFAULT_HOST, get_host
from selcon_plugin.report import finish_run
from selcon_plugin.runs.folder import RunFolder

__all__ = ["default_output", "evaluate", "launch", "train"]


def train(
    host: Host,
    cfg: Any,
    *,
    resume: bool = False,
    overwrite: bool = False,
    source: str = "",
) -> RunResult:
    """Train in this process, as ``selcon train`` does, and write ``report.html``.

    Args:
        host: Training framework.
        cfg: Complete config of the host.
        resume: Whether to resume from the last checkpoint in the run's folder, if there is
            one.
        overwrite: Whether a new run may start in the folder of an earlier one, whose files
            are moved aside. Otherwise it is refused.
        source: File from which the config was read, for the log.

    Returns:
        Folder and results of the run.

    Raises:
        ValueError: If both ``resume`` and ``overwrite`` are set, or the folder is taken.
    """
    if resume and overwrite:
        raise ValueError(
            "--resume continues the run in the folder and --overwrite starts over: give "
            "only one of them"
        )
    result = host.train(cfg, resume=resume, overwrite=overwrite, source=source)
    if result.trained:
        finish_run(result.folder, host)
    host.check_expected(cfg, result)
    return result


def default_output(
    host: Host, images: str, *, resume: bool = False, overwrite: bool = False
) -> str:
    """Choose the folder of a run on a folder of images, if the user names none.

    Args:
        host: Training framework.
        images: Folder of the images.
        resume: Whether the run continues the last one on this folder.
        overwrite: Whether it replaces the last one.

    Returns:
        ``logs/NAME`` for a folder of this name; with a number if that holds a run.
    """
    name = Path(images).expanduser().resolve().name or "images"
    name = "".join(c if c.isprintable() and c not in "\\:" else "_" for c in name)
    base = Path("logs") if host.name == DEFAULT_HOST else Path("logs", host.name)
    numbered = [base / name]
    while RunFolder(numbered[-1]).holds_run:
        numbered.append(base / f"{name}-{len(numbered) + 1}")
    if (resume or overwrite) and len(numbered) > 1:
        return str(numbered[-2])
    return str(numbered[-1])


def evaluate(host: Host, cfg: Any, *, source: str = "") -> Mapping[str, Any]:
    """Evaluate the weights that a config names, in this process.

    Args:
        host: Framework of the evaluation.
        cfg: Complete config of the host.
        source: File from which the config was read, for the log.

    Returns:
        Metrics by test set.
    """
    return host.evaluate(cfg, source=source)


def launch(
    host: Host,
    cfg: Any,
    processes: Processes,
    *,
    eval_only: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    source: str = "",
    imports: Sequence[str] = (),
) -> None:
    """Train or evaluate in one process or several.

    Args:
        host: Training framework.
        cfg: Complete config of the host.
        processes: Number of processes and their rendezvous.
        eval_only: Whether to evaluate instead of training.
        resume: As for :func:`train`.
        overwrite: As for :func:`train`.
        source: File from which the config was read, for the log.
        imports: Python files that each process imports first.

    Raises:
        ValueError: If the host does not support this number of processes, or a setting is
            wrong.
        ProcessFailure: If one of several processes failed.
    """  # noqa: DOC502  (raised by the functions called here)
    arguments = (host.name, cfg, eval_only, resume, overwrite, source, tuple(imports))
    host.launch(_in_each_process, arguments, processes, training=None if eval_only else cfg)


def _in_each_process(
    host_name: str,
    cfg: Any,
    eval_only: bool,
    resume: bool,
    overwrite: bool,
    source: str,
    imports: Sequence[str],
) -> None:
    import_files(imports)
    host = get_host(host_name)
    if eval_only:
        evaluate(host, cfg, source=source)
    else:
        train(host, cfg, resume=resume, overwrite=overwrite, source=source)
