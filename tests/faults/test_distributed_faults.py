"""Real processes that fail, are killed or hang: the others end with the reason."""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

pytest.importorskip("fastreid")

from helpers.ddp import spawn_from_server
from helpers.programs import Program
from selcon_plugin.cli.train import train_parser
from selcon_plugin.fastreid_ext import launch as launching
from selcon_plugin.fastreid_ext.launch import (
    TIMEOUT_MINUTES,
    ProcessFailure,
    free_port,
    launch,
    raise_first_failure,
)

ROOT = Path(__file__).resolve().parents[2]
HANG = 600.0  # seconds
SOON = 300.0  # processes start slowly on a busy machine


def exchange(fault: str, folder: str) -> None:
    """Sum ones over all processes; the last process fails in the third round."""
    torch.set_num_threads(1)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    for step in range(5):
        if step == 3:
            (Path(folder) / f"{dist.get_rank()}.pid").write_text(str(os.getpid()))
        if is_last and step == 3:
            fail(fault)
        dist.all_reduce(torch.ones(1))


def fail(fault: str) -> None:
    if fault == "error":
        raise RuntimeError("the third step went wrong")
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(HANG)


def ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A zombie process keeps its entry until its parent reads its status.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def assert_all_ended(folder: Path) -> None:
    pids = [int(file.read_text()) for file in folder.glob("*.pid")]
    assert pids
    deadline = time.monotonic() + 10
    while not all(ended(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert all(ended(pid) for pid in pids)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("error", r"process 1 of 2 failed(.|\n)*the third step went wrong"),
        ("killed", r"process 1 of 2 was killed by SIGKILL .*--resume"),
        ("hang", r"process 0 of 2 waited .* longer than --dist-timeout"),
    ],
)
def test_one_process_that_fails_ends_the_others(
    fault: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault != "error":  # one of them starts its processes as a user's launch does
        monkeypatch.setattr(launching, "spawn", spawn_from_server)
    started = time.monotonic()
    with pytest.raises(ProcessFailure, match=message):
        launch(exchange, 2, timeout_minutes=0.1, args=(fault, str(tmp_path)))
    assert time.monotonic() - started < SOON
    assert_all_ended(tmp_path)


class Failures(list):
    """Fake queue with the reports of the processes, in order."""

    def empty(self) -> bool:
        return not self

    def get(self) -> tuple:
        return self.pop(0)


ERROR, LOST = (5, False, "", "trace of 5"), (4, False, "", "connection closed")


@pytest.mark.parametrize(
    ("exit_codes", "failures", "error", "message"),
    [
        ([1, 1], [ERROR, LOST], ProcessFailure, "process 5 of 8 failed(.|\n)*trace of 5"),
        ([1, 1], [(5, True, "KEY is 0", ""), LOST], ValueError, "^KEY is 0$"),
        ([1, -9], [LOST], ProcessFailure, "process 5 of 8 was killed by SIGKILL"),
        ([-6, -15], [], ProcessFailure, "process 4 of 8 was killed by SIGABRT .*NCCL"),
        ([1, 143], [LOST], SystemExit, "143"),
    ],
)
def test_first_failure_is_distinguished_from_later_ones(
    exit_codes: list[int], failures: list, error: type[BaseException], message: str
) -> None:
    processes = SimpleNamespace(processes=[SimpleNamespace(exitcode=c) for c in exit_codes])
    with pytest.raises(error, match=message):
        raise_first_failure(processes, Failures(failures), first_rank=4, world_size=8)


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_time_out_must_be_in_range(minutes: float) -> None:
    with pytest.raises(ValueError, match="--dist-timeout must be above 0 and at most"):
        launch(exchange, 2, timeout_minutes=minutes)


def test_command_line_has_the_same_default() -> None:
    assert train_parser("train").parse_args([]).dist_timeout == TIMEOUT_MINUTES


@pytest.mark.parametrize("fault", [pytest.param("error", marks=pytest.mark.slow), "killed"])
def test_torchrun_ends_the_others_with_the_reason(fault: str, tmp_path: Path) -> None:
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = Program(*run, __file__, fault, tmp_path)
    _, errors = process.communicate(timeout=SOON)
    assert process.returncode == 1
    # Which process torchrun takes for the root cause depends on when it looks at them.
    failures = errors.partition("ChildFailedError")[2]
    expected = {"error": "the third step went wrong", "killed": "Signal 9 (SIGKILL)"}
    assert expected[fault] in failures
    assert_all_ended(tmp_path)


def test_machine_that_vanishes_ends_the_other(tmp_path: Path) -> None:
    """Start two launchers, as on two machines; kill the second with its process."""
    meeting = f"tcp://127.0.0.1:{free_port()}"
    first, second = (
        Program(__file__, "hang", tmp_path, meeting, rank) for rank in range(2)
    )
    try:
        pid_file = tmp_path / "1.pid"
        deadline = time.monotonic() + SOON
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second.kill()
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
        _, errors = first.communicate(timeout=SOON)
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
    assert first.returncode == 1
    assert "process 0 of 2 failed" in errors
    assert_all_ended(tmp_path)


if __name__ == "__main__":
    fault, folder, *machine = sys.argv[1:]
    options = {}
    if machine:
        options = {
            "num_machines": 2,
            "machine_rank": int(machine[1]),
            "dist_url": machine[0],
        }
    # A fork: this process has imported everything, and nothing runs in it yet.
    launching.spawn = functools.partial(start_processes, start_method="fork")
    launch(exchange, 1, timeout_minutes=0.1, args=(fault, folder), **options)
