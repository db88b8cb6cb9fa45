"""Progress on what takes longer than a second."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import TYPE_CHECKING, TextIO

from chaos.signals import held

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import Console
    from rich.progress import Progress, TaskID

PATIENCE = 1.0


@contextlib.contextmanager
def progress(
    stream: TextIO,
    what: str,
    total: int,
    *,
    quiet: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each of ``total`` things.

    A bar appears on ``stream`` once a second has passed, if it is a terminal; ``environ`` is
    the environment that describes that terminal, by default this process's own.
    """
    if quiet or total <= 1 or not stream.isatty():
        yield lambda: None
        return
    bar = _LateBar(lambda done: _bar(_console(stream, environ), what, total, done))
    try:
        yield bar.advance
    finally:
        bar.close()


class _LateBar:
    """A bar that is made after a while, in a thread: nothing may be done by then."""

    def __init__(self, make: Callable[[int], tuple[Progress, TaskID]]) -> None:
        self._make = make
        self._done = 0
        self._over = False
        self._shown: tuple[Progress, TaskID] | None = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(PATIENCE, self._show)
        self._timer.daemon = True
        with held():  # for it and for the bar's own thread: signals are for those that hold them
            self._timer.start()

    def _show(self) -> None:
        with self._lock, contextlib.suppress(OSError, ValueError):  # nobody looks at it
            if not self._over:
                self._shown = self._make(self._done)

    def advance(self) -> None:
        """One more is done."""
        with self._lock:
            self._done += 1
            if self._shown is not None:
                bar, task = self._shown
                bar.advance(task)

    def close(self) -> None:
        """Take it away."""
        self._timer.cancel()
        with self._lock:
            self._over = True
        self._timer.join()
        if self._shown is not None:
            self._shown[0].stop()


def _console(stream: TextIO, environ: Mapping[str, str] | None) -> Console:
    """A console on the stream, of a terminal as the environment describes it."""
    from rich.console import Console

    return Console(file=stream, _environ=os.environ if environ is None else environ)


def _bar(console: Console, what: str, total: int, done: int) -> tuple[Progress, TaskID]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        what,
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = bar.add_task(what, total=total, completed=done)
    bar.start()
    return bar, task
