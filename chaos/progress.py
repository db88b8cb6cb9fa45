"""Progress on what takes longer than a second."""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import Console

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
    if quiet or total == 1 or not stream.isatty():
        yield lambda: None
        return
    start = time.monotonic()
    done = 0
    with contextlib.ExitStack() as stack:
        update: Callable[[], None] | None = None

        def advance() -> None:
            nonlocal done, update
            done += 1
            if update is None and time.monotonic() - start > PATIENCE:
                update = _bar(stack, _console(stream, environ), what, total, done - 1)
            if update is not None:
                update()

        yield advance


def _console(stream: TextIO, environ: Mapping[str, str] | None) -> Console:
    """A console on the stream, of a terminal as the environment describes it."""
    from rich.console import Console

    return Console(file=stream, _environ=os.environ if environ is None else environ)


def _bar(
    stack: contextlib.ExitStack, console: Console, what: str, total: int, done: int
) -> Callable[[], None]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        what,
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    stack.enter_context(bar)
    task = bar.add_task(what, total=total, completed=done)
    return lambda: bar.advance(task)
