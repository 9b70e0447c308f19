"""Training and evaluation in any host, with the report of a finished run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selcon_plugin.config.host import Host
from selcon_plugin.config.host_data import Processes, RunResult
from selcon_plugin.config.loading import import_files
from selcon_plugin.hosts import get_host
from selcon_plugin.report import finish_run

__all__ = ["evaluate", "launch", "train"]


def train(host: Host, cfg: Any, *, resume: bool = False, source: str = "") -> RunResult:
    """Train in this process, as ``selcon train`` does, and write ``report.html``.

    Args:
        host: Framework that trains.
        cfg: Complete config of the host.
        resume: Whether to resume from the last checkpoint in the run's folder, if there is
            one.
        source: File of the config, for the log.

    Returns:
        Folder, weights and metrics of the run.
    """
    result = host.train(cfg, resume=resume, source=source)
    if result.trained:
        finish_run(result.folder, host)
    host.check_expected(cfg, result)
    return result


def evaluate(host: Host, cfg: Any, *, source: str = "") -> Mapping[str, Any]:
    """Evaluate the weights that a config names, in this process.

    Args:
        host: Framework that evaluates.
        cfg: Complete config of the host.
        source: File of the config, for the log.

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
    source: str = "",
    imports: Sequence[str] = (),
) -> None:
    """Train or evaluate in one process or several.

    Args:
        host: Framework that trains.
        cfg: Complete config of the host.
        processes: Number of processes and their rendezvous.
        eval_only: Whether to evaluate instead of training.
        resume: As for :func:`train`.
        source: File of the config, for the log.
        imports: Python files that each process imports first.

    Raises:
        ValueError: If the host does not support that many processes, or a setting is
            invalid.
        ProcessFailure: If one of several processes failed.
    """  # noqa: DOC502  (raised by the functions called here)
    arguments = (host.name, cfg, eval_only, resume, source, tuple(imports))
    host.launch(_in_each_process, arguments, processes, training=None if eval_only else cfg)


def _in_each_process(
    host_name: str,
    cfg: Any,
    eval_only: bool,
    resume: bool,
    source: str,
    imports: Sequence[str],
) -> None:
    import_files(imports)
    host = get_host(host_name)
    if eval_only:
        evaluate(host, cfg, source=source)
    else:
        train(host, cfg, resume=resume, source=source)
