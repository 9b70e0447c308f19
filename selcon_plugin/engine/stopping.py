"""SIGTERM and Ctrl-C: a run stops between two steps, where it can go on exactly."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from selcon_plugin.distributed import rank, world_size

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_STATUSES = tuple(128 + number for number in STOP_SIGNALS)
_NO_LIMIT = datetime.timedelta(days=7)
_DEFAULT_HANDLERS = (signal.SIG_DFL, signal.default_int_handler)


class RunStopped(SystemExit):
    """A run ended on a signal; uncaught, the process ends with the usual status for it.

    Args:
        number: The signal: status 143 for SIGTERM, 130 for SIGINT.
    """

    code: int

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


def is_stop_status(status: int | None) -> bool:
    """Tell whether a process ended by :class:`RunStopped`.

    Args:
        status: Its exit status.

    Returns:
        Whether it is 143 or 130.
    """
    return status in _STATUSES


def ignore_stop_signals(_worker: int = 0) -> None:
    """Leave SIGTERM and SIGINT to the training process; for workers that read images.

    Ctrl-C and some schedulers signal all processes of a job. A worker that ended by it
    would end the run in the middle of a step. Workers end when the run does, also by the
    SIGTERM with which the training process itself ends those that it cannot reach
    otherwise. Where a signal's sender cannot be told (macOS, Windows), SIGTERM ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # Of all threads: the signal is left to the one that waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextlib.contextmanager
def stop_signals_go_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle SIGTERM and SIGINT, where that is Python's own business so far.

    What a script has set up stays, also that a signal is ignored; and so does all outside
    the main thread, where Python allows no handlers.

    Args:
        handler: Called with the signal's number and the stack's frame.

    Yields:
        Nothing.
    """
    earlier = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in _DEFAULT_HANDLERS:
                earlier[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)


class StopSignals:
    """Takes note of SIGTERM and SIGINT inside its ``with`` block.

    The first signal is noted, for the run to stop where it can; a second Ctrl-C interrupts
    at once.

    With several processes all of them must ask :meth:`requested` equally often; the answer
    is the same in all. It is one call old, so that no step waits for the slowest process's
    signal, and goes over the CPU, so that none waits for a GPU.
    """

    def __init__(self) -> None:
        self._number = 0
        self._handlers = contextlib.ExitStack()
        self._group: Any = None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> StopSignals:
        self._number, self._asked = 0, None
        if world_size() > 1:
            # Its waits are those for the slowest rank, which the main group's limit is for.
            self._group = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
        self._handlers.enter_context(stop_signals_go_to(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def _note(self, number: int, _frame: object) -> None:
        if self._number == number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._number and rank() == 0:
            # Not the logger or sys.stderr: the signal may have come while they are busy.
            name = signal.Signals(number).name
            again = "; Ctrl-C again gives up what follows the last checkpoint"
            text = (
                f"\n{name}: stopping after this step{again * (number == signal.SIGINT)}\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
        self._number = self._number or number

    def requested(self) -> int:
        """Return the signal to stop on, 0 for none; between two steps."""
        if self._group is None:
            return self._number
        answer = 0
        if self._asked is not None:
            numbers, work = self._asked
            work.wait()
            answer = int(numbers)
        numbers = torch.tensor(self._number)
        work = dist.all_reduce(numbers, dist.ReduceOp.MAX, self._group, async_op=True)
        self._asked = numbers, work
        return answer

    def wait_for_all(self) -> None:
        """Wait until all processes are here: none may end while another still saves."""
        if self._group is not None:
            dist.barrier(self._group)

    def stop_if_asked(
        self,
        save: Callable[[int], None],
        *,
        epoch: int,
        step: int,
        steps_per_epoch: int,
        resume_by: str,
    ) -> None:
        """End the run if a signal asks for it; between two steps.

        Args:
            save: Writes a checkpoint of the run as it stands, and what else the host has to
                write; called with the steps done of this epoch.
            epoch: Counted from 0.
            step: Optimizer steps done.
            steps_per_epoch: Steps of a whole epoch.
            resume_by: How a script resumes the run, for the message.

        Raises:
            RunStopped: If a signal came; a ``SystemExit``.
        """  # noqa: DOC502  (raised by name, below)
        number = self.requested()
        if not number:
            return
        steps_done = step - epoch * steps_per_epoch
        save(steps_done)
        self.wait_for_all()
        stop = RunStopped(number)
        logger.warning(
            "Stopped by %s, after %d of %d steps of epoch %d. To resume: the same command "
            "with --resume, in a script %s",
            stop.signal_name,
            steps_done,
            steps_per_epoch,
            epoch + 1,
            resume_by,
        )
        raise stop
