"""Test files that are also programs: one process per rank, connected by gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from helpers.programs import Program, start_server


def run_ranks(
    program: str, folder: Path, world_size: int = 2, timeout: float = 300
) -> None:
    """Run ``python PROGRAM RANK FOLDER`` for each rank, and fail with a rank's errors."""
    ranks = [Program(program, rank, folder) for rank in range(world_size)]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:  # a rank may still wait for one that failed
            rank.kill()
            rank.wait()


def saved_by_ranks(folder: Path, world_size: int = 2) -> list[dict]:
    """Load the file ``RANK.pt`` of each rank."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def join_group(rank: int, folder: Path, world_size: int = 2) -> None:
    """Join the process group as one of the ranks, with one thread."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    torch.set_num_threads(1)


def spawn_from_server(*arguments: Any, **options: Any) -> Any:
    """Call ``torch.multiprocessing.start_processes`` with the fork server."""
    start_server()
    return torch.multiprocessing.start_processes(
        *arguments, **options, start_method="forkserver"
    )
