"""Handling of SIGTERM and Ctrl-C: a run stops between two steps, where it can resume."""

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
    """Exit of a run that was stopped by a signal; uncaught, it gives the usual exit status.

    Args:
        number: Signal number; the status is 143 for SIGTERM and 130 for SIGINT.
    """

    code: int

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal_name = signal.Signals(number).name


def is_stop_status(status: int | None) -> bool:
    """Return whether a process ended with :class:`RunStopped`.

    Args:
        status: Exit status of the process.

    Returns:
        Whether the status is 143 or 130.
    """
    return status in _STATUSES


def ignore_stop_signals(_worker: int = 0) -> None:
    """Make a worker that reads images ignore SIGTERM and SIGINT.

    Ctrl-C and some schedulers signal all processes of a job. A worker that ended on such a
    signal would end the run in the middle of a step. Workers end when the run does, also on
    the SIGTERM that the training process itself sends to workers that do not exit
    otherwise. Where the sender of a signal is unknown (macOS, Windows), SIGTERM ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        # All threads block the signal, except the one that waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextlib.contextmanager
def stop_signals_go_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle SIGTERM and SIGINT where they still have Python's default handlers.

    Handlers that a script has installed stay, including ignored signals. Nothing changes
    outside the main thread, where Python allows no handlers.

    Args:
        handler: Called with the signal number and the stack frame.

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
    """Recorder of SIGTERM and SIGINT inside its ``with`` block.

    The first signal is recorded, and the run stops where it can; a second Ctrl-C interrupts
    at once.

    With several processes, all of them must call :meth:`requested` equally often; the
    result is the same in all. It is one call old, so that no step waits for the signal of
    the slowest process, and it is exchanged over the CPU, so that no step waits for a GPU.
    """

    def __init__(self) -> None:
        self._number = 0
        self._handlers = contextlib.ExitStack()
        self._group: Any = None
        self._asked: tuple[torch.Tensor, Any] | None = None

    def __enter__(self) -> StopSignals:
        self._number, self._asked = 0, None
        if world_size() > 1:
            # It waits for the slowest rank, which only the main group's timeout limits.
            self._group = dist.new_group(backend="gloo", timeout=_NO_LIMIT)
        self._handlers.enter_context(stop_signals_go_to(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        self._handlers.close()

    def _note(self, number: int, _frame: object) -> None:
        if self._number == number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._number and rank() == 0:
            # The logger and sys.stderr may be busy when the signal arrives.
            name = signal.Signals(number).name
            again = "; Ctrl-C again discards the steps since the last checkpoint"
            text = (
                f"\n{name}: stopping after this step{again * (number == signal.SIGINT)}\n"
            )
            with contextlib.suppress(OSError):
                os.write(2, text.encode())
        self._number = self._number or number

    def requested(self) -> int:
        """Return the number of the received signal, or 0; to be called between steps."""
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
        """Wait for all processes, so that none ends while another still saves."""
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
        """End the run if a signal was received; call this between two steps.

        Args:
            save: Writes a checkpoint of the current state, and the host's other files;
                called with the number of steps done in this epoch.
            epoch: Index of the epoch, counted from 0.
            step: Number of optimizer steps done.
            steps_per_epoch: Number of steps in a whole epoch.
            resume_by: How a script resumes the run, for the log message.

        Raises:
            RunStopped: If a signal was received; it is a ``SystemExit``.
        """  # noqa: DOC502  (raised from a variable)
        number = self.requested()
        if not number:
            return
        steps_done = step - epoch * steps_per_epoch
        save(steps_done)
        self.wait_for_all()
        stop = RunStopped(number)
        logger.warning(
            "Stopped by %s, after %d of %d steps of epoch %d. To resume, run the same "
            "command with --resume, or in a script %s",
            stop.signal_name,
            steps_done,
            steps_per_epoch,
            epoch + 1,
            resume_by,
        )
        raise stop
