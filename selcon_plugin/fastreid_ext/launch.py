"""Launch of one or several training processes on GPUs (NCCL) or CPUs (gloo).

If a process fails or is killed, all others end as well: those on the same machine at once,
those on other machines when their communication times out.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import re
import signal
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from fastreid.utils import comm
from torch.distributed.elastic.multiprocessing.errors import record
from torch.multiprocessing.spawn import (
    ProcessContext,
    ProcessExitedException,
    ProcessRaisedException,
    spawn,
)

from selcon_plugin.config.host_data import ProcessFailure
from selcon_plugin.engine.stopping import stop_signals_go_to
from selcon_plugin.io.errors import ResourceError

# Time enough for one process to cluster or to evaluate while the others wait.
TIMEOUT_MINUTES = 30.0
_WEEK = 7 * 24 * 60

# Exceptions of user errors, whose message is enough without a traceback.
_USER_ERRORS = (ValueError, OSError, ImportError, ResourceError)

_USUAL_CAUSES = {
    "SIGKILL": " (out of memory?)",
    "SIGABRT": " (NCCL timeout? see the log above)",
}


_RENDEZVOUS = re.compile(r"tcp://\S+:\d+|env://|file://\S+")


def launch(
    main: Callable[..., Any],
    num_processes: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    timeout_minutes: float = TIMEOUT_MINUTES,
    args: tuple[Any, ...] = (),
) -> Any:
    """Run ``main`` in one or several processes.

    Under torchrun, which has started the processes itself, this process joins their group.
    This function replaces FastReID's ``launch``, which requires CUDA and NCCL.

    Args:
        main: Called as ``main(*args)`` in every process; must be importable by name.
        num_processes: Processes on this machine: GPUs, or CPU workers without CUDA.
        num_machines: Number of machines.
        machine_rank: Rank of this machine.
        dist_url: Rendezvous address, ``tcp://host:port``; "auto" finds a free local port.
        timeout_minutes: Time that a process waits for another before it gives up. It must
            exceed the longest work of a single process: clustering, evaluation.
        args: Arguments of ``main``.

    Returns:
        Result of ``main`` if it ran in this process, otherwise None.

    Raises:
        ValueError: If there are not enough GPUs, several machines have no common
            ``dist_url``, the timeout is out of range, or ``main`` raised a user error.
        ProcessFailure: If one of several processes failed; the message names it and the
            cause.
    """  # noqa: DOC502  (raised by the functions called here)
    if not 0 < timeout_minutes <= _WEEK:
        raise ValueError(
            f"--dist-timeout must be above 0 and at most {_WEEK} minutes, a week, got "
            f"{timeout_minutes}"
        )
    if under_torchrun():
        return _run_under_torchrun(main, args, timeout_minutes)
    world_size = num_machines * num_processes
    if world_size == 1:
        return main(*args)
    if torch.cuda.is_available() and num_processes > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus is {num_processes}, but this machine has "
            f"{torch.cuda.device_count()}"
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("several machines need a common --dist-url tcp://host:port")
        dist_url = f"tcp://127.0.0.1:{free_port()}"
    failures = multiprocessing.get_context("spawn").SimpleQueue()
    worker_args = (
        main,
        world_size,
        num_processes,
        machine_rank,
        dist_url,
        timeout_minutes,
        args,
        failures,
    )
    context = spawn(  # type: ignore[no-untyped-call]
        _worker, nprocs=num_processes, args=worker_args, join=False
    )
    first_rank = machine_rank * num_processes
    _wait_for(context, failures, first_rank, world_size)
    return None


def under_torchrun() -> bool:
    """Return whether torchrun, or a program like it, has started this process."""
    return (
        "TORCHELASTIC_RUN_ID" in os.environ
        or {
            "RANK",
            "WORLD_SIZE",
        }
        <= os.environ.keys()
    )


def _wait_for(
    context: ProcessContext, failures: Any, first_rank: int, world_size: int
) -> None:
    """Wait for the processes; raise the failure of one, or the status of a stopped run."""
    stopped_by: list[int] = []

    def forward_signal(number: int, _frame: object) -> None:
        stopped_by.append(number)
        for process in context.processes:
            if process.is_alive():
                # SIGTERM: Ctrl-C has reached them already, and a second SIGINT interrupts.
                os.kill(process.pid, signal.SIGTERM)

    try:
        # The processes decide when to stop on SIGTERM and Ctrl-C.
        with stop_signals_go_to(forward_signal):
            while not context.join():
                pass
    except (ProcessRaisedException, ProcessExitedException) as error:
        # The error names a random process: when one ends, the others fail as well.
        raise_first_failure(context, failures, first_rank, world_size)
        if stopped_by:  # the signal came before any process started to train
            raise SystemExit(128 + stopped_by[0]) from None
        raise ProcessFailure(str(error)) from error


def raise_first_failure(
    context: ProcessContext, failures: Any, first_rank: int, world_size: int
) -> None:
    """Raise the error of the first process that failed; all processes have ended."""
    rest = "The others were ended; --resume continues from the last checkpoint"
    reports = []
    while not failures.empty():
        reports.append(failures.get())
    reported = {report[0] for report in reports}
    for rank, process in enumerate(context.processes, first_rank):
        if rank in reported:  # gloo may still abort a process while it ends
            continue
        # The launcher ends the others with SIGTERM.
        if process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            name = signal.Signals(-process.exitcode).name
            cause = _USUAL_CAUSES.get(name, "")
            raise ProcessFailure(
                f"process {rank} of {world_size} was killed by {name}{cause}. {rest}"
            )
        if process.exitcode > 1:  # 1 is an exception, which is raised below
            raise SystemExit(process.exitcode)
    if reports:
        rank, is_user_error, message, trace = reports[0]
        if is_user_error:
            raise ValueError(message)
        raise ProcessFailure(f"process {rank} of {world_size} failed. {rest}\n\n{trace}")


def check_launch(
    num_processes: int, num_machines: int, machine_rank: int, dist_url: str
) -> None:
    """Refuse invalid numbers of processes and machines.

    Args:
        num_processes: Processes on this machine.
        num_machines: Number of machines.
        machine_rank: Rank of this machine.
        dist_url: Rendezvous address, or "auto".

    Raises:
        ValueError: If a value is invalid; the message names the command-line argument.
    """
    for name, value in (("--num-gpus", num_processes), ("--num-machines", num_machines)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank must be >= 0 and < {num_machines}, the --num-machines, got "
            f"{machine_rank}"
        )
    if dist_url != "auto" and not _RENDEZVOUS.fullmatch(dist_url):
        raise ValueError(
            f"--dist-url must be auto or tcp://host:port, such as tcp://10.0.0.1:29500, "
            f"got {dist_url!r}"
        )


def _run_under_torchrun(
    main: Callable[..., Any], args: tuple[Any, ...], timeout_minutes: float
) -> Any:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    # Records the error where torchrun finds it for its own report.
    recorded = record(_join)
    return recorded(
        main, args, rank, world_size, local_rank, local_size, "env://", timeout_minutes
    )


def _worker(
    local_rank: int,
    main: Callable[..., Any],
    world_size: int,
    local_size: int,
    machine_rank: int,
    dist_url: str,
    timeout_minutes: float,
    args: tuple[Any, ...],
    failures: Any,
) -> None:
    rank = machine_rank * local_size + local_rank
    try:
        _join(
            main,
            args,
            rank,
            world_size,
            local_rank,
            local_size,
            dist_url,
            timeout_minutes,
        )
    except Exception as error:
        # Reported before this process ends: after that the others lose the connection.
        # A lack of time or space is no mistake of the user, and needs no traceback.
        is_resource = isinstance(error, ResourceError)
        is_user_error = isinstance(error, _USER_ERRORS) and not is_resource
        trace = str(error) if is_resource else traceback.format_exc()
        failures.put((rank, is_user_error, str(error), trace))
        raise


def _join(
    main: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    local_rank: int,
    local_size: int,
    init_method: str,
    timeout_minutes: float,
) -> Any:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    # FastReID uses this group for the rank within the machine.
    for machine in range(world_size // local_size):
        ranks = list(range(machine * local_size, (machine + 1) * local_size))
        group = dist.new_group(ranks)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group
    try:
        result = main(*args)
    except RuntimeError as error:
        # The group is not destroyed: for that, NCCL would wait for the others.
        if "Timed out waiting" not in str(error):
            raise
        raise ResourceError(
            f"process {rank} of {world_size} waited for another longer than --dist-timeout "
            f"{timeout_minutes:g} minutes: the other one has ended, hangs, or needs more "
            "time"
        ) from error
    dist.destroy_process_group()
    return result


def free_port() -> int:
    """Return a free local TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
