"""Ctrl-C, or SIGTERM, that waits for the end of a step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


class Interrupt:
    """Whether Ctrl-C was pressed, or the process told to end."""

    def __init__(self) -> None:
        self.happened = False
        self._deferred = True

    def on_signal(self, *_: object) -> None:
        """Handler of both signals."""
        self.happened = True
        if not self._deferred:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, both raise KeyboardInterrupt."""
        self._deferred = False
        try:
            yield
        finally:
            self._deferred = True


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Yield what the signals set, so that a step is never cut in half.

    Outside the main thread Python delivers no signals: it then stays unset.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    # None: a handler that Python cannot put back; a signal that is ignored stays so
    left_alone = (None, signal.SIG_IGN)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) not in left_alone}
    for number in before:
        signal.signal(number, interrupt.on_signal)
    try:
        yield interrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
