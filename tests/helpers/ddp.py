"""Tests that are programs as well: one process per rank, connected by gloo."""

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
    """Run ``python PROGRAM RANK FOLDER`` for each rank, and fail with what one reports."""
    ranks = [Program(program, rank, folder) for rank in range(world_size)]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:  # one may wait for the other's failure
            rank.kill()
            rank.wait()


def saved_by_ranks(folder: Path, world_size: int = 2) -> list[dict]:
    """Load what each rank saved as ``RANK.pt``."""
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def join_group(rank: int, folder: Path, world_size: int = 2) -> None:
    """Become one of the ranks, on one thread."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size
    )
    torch.set_num_threads(1)


def spawn_from_server(*arguments: Any, **options: Any) -> Any:
    """Do as ``torch.multiprocessing.spawn``, with processes of the fork server."""
    start_server()
    return torch.multiprocessing.start_processes(
        *arguments, **options, start_method="forkserver"
    )
