"""A lock holds between processes, and a kill releases it."""

import errno
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest

from selcon_plugin.io import locks
from selcon_plugin.io.locks import (
    LOCK_NAMES,
    InUseError,
    exclusive,
    owned_file,
    owned_folder,
)

ROOT = Path(__file__).parents[2]

HOLD = """
import subprocess, sys
from pathlib import Path
from selcon_plugin.io.locks import exclusive
with exclusive(Path(sys.argv[1])) as descriptor:
    if sys.argv[2] == "inherited":
        code = "import sys; print('held', flush=True); sys.stdin.read()"
        child = subprocess.Popen([sys.executable, "-c", code], pass_fds=(descriptor,))
        child.wait()
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(path, how="own"):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def is_free(path):
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        return False
    lock.release()
    return True


def test_lock_is_exclusive_and_leaves_no_file(tmp_path):
    path = tmp_path / ".lock"
    with exclusive(path) as descriptor:
        assert os.path.samestat(os.fstat(descriptor), path.stat())
        assert not is_free(path)
    assert list(tmp_path.iterdir()) == []


def test_second_process_waits_and_names_the_file(tmp_path, caplog):
    path = tmp_path / ".lock"
    process = hold(path)
    timer = threading.Timer(0.3, process.stdin.close)
    timer.start()
    with caplog.at_level(logging.INFO), exclusive(path) as descriptor:
        # The first process removed its file: this lock is of the next one.
        assert os.path.samestat(os.fstat(descriptor), path.stat())
        assert process.wait() == 0
    assert f"Process {process.pid} on {socket.gethostname()} holds {path}" in caplog.text
    process.stdout.close()
    assert list(tmp_path.iterdir()) == []


def test_caller_can_report_the_wait_itself(tmp_path, caplog):
    path = tmp_path / ".lock"
    process = hold(path)
    waits = []

    def on_wait():
        waits.append(path)
        process.stdin.close()

    with caplog.at_level(logging.INFO), exclusive(path, on_wait=on_wait):
        pass
    assert waits == [path]
    assert caplog.text == ""
    process.wait()
    process.stdout.close()


def test_kill_releases_the_lock(tmp_path):
    path = tmp_path / ".lock"
    process = hold(path)
    assert not is_free(path)
    process.kill()
    process.communicate()
    assert path.exists()  # nobody was left to remove it
    with exclusive(path) as descriptor:
        assert descriptor is not None
    assert not path.exists()


def test_child_that_inherits_the_lock_holds_it_after_a_kill(tmp_path):
    path = tmp_path / ".lock"
    process = hold(path, "inherited")
    process.kill()
    process.wait()
    assert not is_free(path)
    process.stdin.close()  # the child reads from the same pipe, and ends
    process.stdout.read()
    process.stdout.close()
    assert is_free(path)


def test_file_system_without_locks(tmp_path, monkeypatch):
    import fcntl

    def fail(*_):
        raise OSError(errno.ENOSYS, "no flock")

    monkeypatch.setattr(fcntl, "flock", fail)
    with exclusive(tmp_path / ".lock") as descriptor:
        assert descriptor is None


OWN = """
import sys
from selcon_plugin.io.locks import owned_file, owned_folder
with (owned_file if sys.argv[2] == "file" else owned_folder)(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def own(path, kind="folder"):
    process = subprocess.Popen(
        [sys.executable, "-c", OWN, str(path), kind],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_second_owner_is_refused_at_once_with_the_first_one_and_a_remedy(tmp_path, kind):
    owned = owned_folder if kind == "folder" else owned_file
    process = own(tmp_path / "out", kind)
    began = time.monotonic()
    with pytest.raises(InUseError) as refused, owned(tmp_path / "out"):
        pytest.fail("two owners")
    assert time.monotonic() - began < 1
    for part in (
        str(tmp_path / "out"),
        f"process {process.pid} on {socket.gethostname()}, since 20",
        "stop it",
        "another output",
    ):
        assert part in str(refused.value)
    # A refusal leaves the owner's record and lock.
    with (
        pytest.raises(InUseError, match=f"process {process.pid} "),
        owned(tmp_path / "out"),
    ):
        pass
    process.communicate()
    with owned(tmp_path / "out"):
        pass
    assert [file.name for file in tmp_path.rglob("*")] == ["out"] * (kind == "folder")


def test_output_of_a_killed_owner_is_taken_over(tmp_path):
    process = own(tmp_path)
    process.kill()
    process.communicate()
    assert {file.name for file in tmp_path.iterdir()} == set(LOCK_NAMES[:2])
    with owned_folder(tmp_path):
        assert str(os.getpid()) in (tmp_path / LOCK_NAMES[1]).read_text()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_is_one_process(tmp_path):
    with (
        owned_folder(tmp_path),
        pytest.raises(InUseError, match=str(os.getpid())),
        owned_folder(tmp_path),
    ):
        pass
    child = os.fork()
    if not child:
        time.sleep(30)
        os._exit(0)
    try:  # a worker process of an owner that was killed does not hold its output
        with owned_folder(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_owner_without_flock(tmp_path, monkeypatch, number):
    import fcntl

    def fail(*_):
        raise OSError(number, "no flock")

    monkeypatch.setattr(fcntl, "flock", fail)
    with (
        owned_folder(tmp_path),
        pytest.raises(InUseError, match=f"process {os.getpid()} "),
        owned_folder(tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []
    # Left by a process of this host that is dead.
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / LOCK_NAMES[2]).write_text(f"{dead.pid}\n{socket.gethostname()}\n")
    with owned_folder(tmp_path):
        pass
    # On another host nobody can see whether it lives.
    (tmp_path / LOCK_NAMES[2]).write_text(f"{dead.pid}\nelsewhere\n")
    with pytest.raises(InUseError, match=r"in use.*delete .*soft"), owned_folder(tmp_path):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_owner_on_another_host_of_a_file_system_whose_locks_are_local(
    tmp_path, monkeypatch, alive
):
    record = tmp_path / LOCK_NAMES[1]
    record.write_text(
        '{"pid": 7, "host": "elsewhere", "started": "2026-01-02 03:04:05", "command": "x"}'
    )
    monkeypatch.setattr(locks, "_SILENT_SECONDS", 0.2)
    if alive:
        times = iter(range(100))
        monkeypatch.setattr(locks, "_modified", lambda _: next(times))
        with pytest.raises(InUseError) as refused, owned_folder(tmp_path):
            pass
        assert "process 7 on elsewhere, since 2026-01-02 03:04:05" in str(refused.value)
        assert f"delete {record}" in str(refused.value)
        assert record.exists()
    else:
        with owned_folder(tmp_path):
            assert "elsewhere" not in record.read_text()


def test_owner_refreshes_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_BEAT_SECONDS", 0.01)
    with owned_folder(tmp_path):
        record = tmp_path / LOCK_NAMES[1]
        os.utime(record, (0, 0))
        for _ in range(200):
            if record.stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert record.stat().st_mtime > 0


def test_owner_is_safe_to_print(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/a/selcon", "train", "a\x1b[31m\udcff\n", "b"])
    with (
        owned_folder(tmp_path),
        pytest.raises(InUseError) as refused,
        owned_folder(tmp_path),
    ):
        pass
    # Its record was written and read in between.
    assert r"(selcon train a\x1b[31m\udcff\x0a b)" in str(refused.value)
    odd = locks.Owner("7\n", "\u202ehost", "\x1b[2J", "\u2028")
    assert str(odd) == r"process 7\x0a on \u202ehost, since \x1b[2J (\u2028)"
    assert odd.place == r"7\x0a on \u202ehost"


def test_wait_ends_after_its_time_with_the_owner(tmp_path):
    path = tmp_path / ".lock"
    process = hold(path)
    with pytest.raises(InUseError) as refused, exclusive(path, timeout=0.2):
        pytest.fail("two owners")
    assert f"Process {process.pid} on " in str(refused.value)
    assert str(path) in str(refused.value)
    process.communicate()
    with exclusive(path, timeout=0.2):
        pass
    assert list(tmp_path.iterdir()) == []
