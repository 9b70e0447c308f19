"""SIGTERM and Ctrl-C are recorded, and stop a run where it allows it."""

import multiprocessing
import os
import signal
import subprocess
import threading

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from selcon_plugin.engine.stopping import (
    RunStopped,
    StopSignals,
    ignore_stop_signals,
    is_stop_status,
    stop_signals_go_to,
)


@pytest.fixture(autouse=True)
def _restore_handlers():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    # As in a process that was started from a terminal.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_is_noted_and_the_handlers_restored(number, capfd):
    with StopSignals() as signals:
        assert signals.requested() == 0
        send(number)
        assert signals.requested() == number
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert f"{number.name}: stopping" in capfd.readouterr().err
    with signals:  # a second run in the same process
        assert signals.requested() == 0


def test_second_ctrl_c_interrupts_and_a_second_sigterm_does_not():
    with StopSignals() as signals:
        send(signal.SIGINT)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert signals.requested() == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_what_a_script_has_set_up_stays():
    heard = []
    signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as signals:
        send(signal.SIGTERM)
        send(signal.SIGINT)
        assert signals.requested() == 0
    assert heard == [signal.SIGTERM]


def test_outside_the_main_thread_nothing_is_set_up():
    found = []

    def run():
        with stop_signals_go_to(lambda *_: None):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


def wait_as_worker(ready):
    ignore_stop_signals(0)
    send(signal.SIGTERM)
    send(signal.SIGINT)
    ready.set()
    threading.Event().wait()


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="senders cannot be told")
def test_worker_ends_only_by_its_training_process():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=wait_as_worker, args=(ready,), daemon=True)
    worker.start()
    assert ready.wait(20)
    other_sender = f"kill -TERM {worker.pid}; kill -INT {worker.pid}"
    subprocess.run(["sh", "-c", other_sender], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_status_of_a_stopped_run(number, status):
    with pytest.raises(SystemExit) as stop:
        raise RunStopped(number)
    assert stop.value.code == status
    assert is_stop_status(status)
    assert not is_stop_status(1)
    assert not is_stop_status(None)


def ask_in_step(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with StopSignals() as signals:
        answers = []
        for step in range(4):
            if (rank, step) == (1, 1):
                send(signal.SIGTERM)
            answers.append(int(signals.requested()))
        signals.wait_for_all()
    (folder / f"{rank}.txt").write_text(str(answers))
    dist.destroy_process_group()


def test_all_processes_stop_at_the_same_step(tmp_path):
    """The signal reaches one of two, and the answer of both is one call old."""
    port = 29500 + os.getpid() % 2000
    mp.spawn(ask_in_step, args=(port, tmp_path), nprocs=2)
    answers = [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert answers == ["[0, 0, 15, 15]"] * 2
