"""Ctrl-C, SIGTERM and SIGUSR1 ask training to save and stop; nothing is done inside the signal's handler."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class StopSignals:
    """While the block runs, a stop signal sets `received`; a second Ctrl-C interrupts at once.

    >>> with StopSignals() as signals:
    ...     while not signals.received:
    ...         step()
    """

    def __init__(self):
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._before = {number: signal.signal(number, self._receive) for number in STOPPING}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
