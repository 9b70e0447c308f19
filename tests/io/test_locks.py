"""A lock holds between processes, and a kill releases it."""

import errno
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import filelock

from selcon_plugin.io.locks import exclusive

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
    assert f"Another process holds {path}" in caplog.text
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
