"""Start one or several training processes, on GPUs (NCCL) or CPUs (gloo)."""

from __future__ import annotations

import datetime
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from fastreid.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from selcon_plugin.engine.stopping import is_stop_status, stop_signals_go_to

# Long enough for one rank to draw data or evaluate while the others wait.
_TIMEOUT = datetime.timedelta(hours=2)


def launch(
    main: Callable[..., Any],
    num_processes: int,
    *,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
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
        args: Arguments of ``main``.

    Returns:
        What ``main`` returned where it ran in this process, else None.

    Raises:
        ValueError: If there are not that many GPUs, or several machines have no common
            ``dist_url``.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        return _run_under_torchrun(main, args)
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
    worker_args = (main, world_size, num_processes, machine_rank, dist_url, args)
    processes = spawn(  # type: ignore[no-untyped-call]
        _worker, nprocs=num_processes, args=worker_args, join=False
    )
    _wait_for(processes)
    return None


def _wait_for(processes: Any) -> None:
    """Wait for the processes, and leave it to them when to stop on SIGTERM and Ctrl-C."""

    def hand_on(_number: int, _frame: object) -> None:
        for process in processes.processes:
            if process.is_alive():
                # Not SIGINT: Ctrl-C has reached them already, and a second one interrupts.
                os.kill(process.pid, signal.SIGTERM)

    try:
        with stop_signals_go_to(hand_on):
            while not processes.join():
                pass
    except ProcessExitedException as error:
        # Below 0 for one that had not begun to train.
        status = error.exit_code if error.exit_code > 0 else 128 - error.exit_code
        if is_stop_status(status):
            raise SystemExit(status) from None
        raise


def _run_under_torchrun(main: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    return _join(main, args, rank, world_size, local_rank, local_size, "env://")


def _worker(
    local_rank: int,
    main: Callable[..., Any],
    world_size: int,
    local_size: int,
    machine_rank: int,
    dist_url: str,
    args: tuple[Any, ...],
) -> None:
    rank = machine_rank * local_size + local_rank
    _join(main, args, rank, world_size, local_rank, local_size, dist_url)


def _join(
    main: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    local_rank: int,
    local_size: int,
    init_method: str,
) -> Any:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )
    # FastReID asks this group for the rank within the machine.
    for machine in range(world_size // local_size):
        ranks = list(range(machine * local_size, (machine + 1) * local_size))
        group = dist.new_group(ranks)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group
    try:
        return main(*args)
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
