"""Ctrl-C that is never lost: Python ignores what is raised while it deletes an object, and the program would go on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer, current_thread, main_thread
from types import FrameType

_AGAIN_S = 0.05


@contextmanager
def sure_interrupts() -> Iterator[None]:
    """While it is entered, raise KeyboardInterrupt for Ctrl-C where it is not ignored, at once or a little later.

    Changes nothing outside of the main thread, and where somebody else handles the signal.
    """
    if current_thread() is not main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    hook = sys.unraisablehook

    def ignored(what: sys.UnraisableHookArgs) -> None:
        """In a callback of a weak reference, say: these have no name."""
        if isinstance(what.exc_value, KeyboardInterrupt):
            _again()
        else:
            hook(what)

    def interrupt(_: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_name == "__del__" or frame.f_code is ignored.__code__:
                _again()
                return
            frame = frame.f_back
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = ignored
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _again() -> None:
    """Send the signal to the main thread once more, in a moment."""
    timer = Timer(_AGAIN_S, signal.pthread_kill, (main_thread().ident, signal.SIGINT))
    timer.daemon = True
    timer.start()
