"""Start one or several training processes, on GPUs (NCCL) or CPUs (gloo).

A process that fails or is killed takes the others with it: those of its machine are ended
at once, those of other machines when what they wait for times out.
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

# Long enough for one process to cluster or to evaluate while the others wait.
TIMEOUT_MINUTES = 30.0
_WEEK = 7 * 24 * 60

# What a user's mistakes raise: the message says it all.
_MISTAKES = (ValueError, FileNotFoundError, ImportError)

_USUAL_CAUSES = {
    "SIGKILL": " (out of memory?)",
    "SIGABRT": " (did NCCL wait in vain? see the log above)",
}


_MEETING_POINT = re.compile(r"tcp://\S+:\d+|env://|file://\S+")


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
    Takes the place of FastReID's ``launch``, which insists on CUDA and NCCL.

    Args:
        main: Called as ``main(*args)`` in every process; must be importable by name.
        num_processes: Processes on this machine: GPUs, or CPU workers without CUDA.
        num_machines: Number of machines.
        machine_rank: Rank of this machine.
        dist_url: Meeting point, ``tcp://host:port``; "auto" finds a free local port.
        timeout_minutes: How long a process waits for another before it gives up. Must
            exceed the longest work that one does alone: clustering, evaluation.
        args: Arguments of ``main``.

    Returns:
        What ``main`` returned where it ran in this process, else None.

    Raises:
        ValueError: If there are not that many GPUs, several machines have no common
            ``dist_url``, the time-out is out of range, or ``main`` raised a user's mistake.
        ProcessFailure: If one of several processes failed; says which and why.
    """  # noqa: DOC502  (raised by the functions called here)
    if not 0 < timeout_minutes <= _WEEK:
        raise ValueError(
            f"--dist-timeout must be above 0 and at most {_WEEK} minutes, a week, got "
            f"{timeout_minutes}"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return _run_under_torchrun(main, args, timeout_minutes)
    world_size = num_machines * num_processes
    if world_size == 1:
        return main(*args)
    if torch.cuda.is_available() and num_processes > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus {num_processes}, but this machine has {torch.cuda.device_count()}"
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("several machines need a common --dist-url tcp://host:port")
        dist_url = f"tcp://127.0.0.1:{_free_port()}"
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


def _wait_for(
    context: ProcessContext, failures: Any, first_rank: int, world_size: int
) -> None:
    """Wait for the processes; raise why one failed, or the status of a run stopped."""
    stopped_by: list[int] = []

    def hand_on(number: int, _frame: object) -> None:
        stopped_by.append(number)
        for process in context.processes:
            if process.is_alive():
                # Not SIGINT: Ctrl-C has reached them already, and a second one interrupts.
                os.kill(process.pid, signal.SIGTERM)

    try:
        # It is left to the processes when to stop on SIGTERM and Ctrl-C.
        with stop_signals_go_to(hand_on):
            while not context.join():
                pass
    except (ProcessRaisedException, ProcessExitedException) as error:
        # Which process the error names is chance: when one ends, the others fail as well.
        _raise_first_failure(context, failures, first_rank, world_size)
        if stopped_by:  # before one had begun to train
            raise SystemExit(128 + stopped_by[0]) from None
        raise ProcessFailure(str(error)) from error


def _raise_first_failure(
    context: ProcessContext, failures: Any, first_rank: int, world_size: int
) -> None:
    """Raise what the first process to fail died of; all have ended."""
    rest = "The others have been ended; --resume goes on from the last checkpoint"
    reports = []
    while not failures.empty():
        reports.append(failures.get())
    have_said_why = {report[0] for report in reports}
    for rank, process in enumerate(context.processes, first_rank):
        if rank in have_said_why:  # gloo may still abort one while it ends
            continue
        # The launcher ends the others by SIGTERM.
        if process.exitcode < 0 and process.exitcode != -signal.SIGTERM:
            name = signal.Signals(-process.exitcode).name
            cause = _USUAL_CAUSES.get(name, "")
            raise ProcessFailure(
                f"process {rank} of {world_size} was killed by {name}{cause}. {rest}"
            )
        if process.exitcode > 1:  # 1 is an exception: see below
            raise SystemExit(process.exitcode)
    if reports:
        rank, is_mistake, message, trace = reports[0]
        if is_mistake:
            raise ValueError(message)
        raise ProcessFailure(f"process {rank} of {world_size} failed. {rest}\n\n{trace}")


def check_launch(
    num_processes: int, num_machines: int, machine_rank: int, dist_url: str
) -> None:
    """Refuse numbers of processes and machines that cannot be.

    Args:
        num_processes: Processes on this machine.
        num_machines: Number of machines.
        machine_rank: Rank of this machine.
        dist_url: Meeting point, or "auto".

    Raises:
        ValueError: If one is out of range; names the argument of the command line.
    """
    for name, value in (("--num-gpus", num_processes), ("--num-machines", num_machines)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--machine-rank must be >= 0 and < {num_machines}, the --num-machines, got "
            f"{machine_rank}"
        )
    if dist_url != "auto" and not _MEETING_POINT.fullmatch(dist_url):
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
    # Leaves the error where torchrun finds it, for its own report.
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
        # Before this process ends: only then do the others see the connection break.
        is_mistake = isinstance(error, _MISTAKES)
        failures.put((rank, is_mistake, str(error), traceback.format_exc()))
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
    # FastReID asks this group for the rank within the machine.
    for machine in range(world_size // local_size):
        ranks = list(range(machine * local_size, (machine + 1) * local_size))
        group = dist.new_group(ranks)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group
    try:
        result = main(*args)
    except RuntimeError as error:
        # The group is left as it is: to take it down, NCCL would wait for the others.
        if "Timed out waiting" not in str(error):
            raise
        raise RuntimeError(
            f"process {rank} of {world_size} waited for another longer than --dist-timeout "
            f"{timeout_minutes:g} minutes: that one has ended, hangs, or does work that "
            "takes longer"
        ) from error
    dist.destroy_process_group()
    return result


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
