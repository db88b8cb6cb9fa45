"""Progress of what the daemon does for a command, on the terminal of its client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING

from chaos.daemon.streams import Output
from chaos.progress import progress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from chaos.invocation import Invocation

PATIENCE = 1.0
"""Seconds that a bar has to go away; whether a terminal is one may take for ever to find out."""


@contextlib.asynccontextmanager
async def bar(call: Invocation, what: str, total: int) -> AsyncIterator[Callable[[], None]]:
    """A progress bar on the client's terminal, which a thread of its own draws."""
    if total <= 1 or getattr(call.args, "quiet", False):
        yield lambda: None
        return
    loop = asyncio.get_running_loop()
    drawn = loop.create_future()

    def ended() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(drawn.set_result, None)

    drawing = Drawing(call, what, total, ended)
    try:
        yield drawing.advance
    finally:
        drawing.finish()
        await asyncio.wait({drawn}, timeout=PATIENCE)


@contextlib.contextmanager
def bar_of_thread(call: Invocation, what: str, total: int) -> Iterator[Callable[[], None]]:
    """The same for a verb that runs in a thread."""
    if total <= 1 or getattr(call.args, "quiet", False) or not isinstance(call.stderr, Output):
        yield lambda: None
        return
    drawn = threading.Event()
    drawing = Drawing(call, what, total, drawn.set)
    try:
        yield drawing.advance
    finally:
        drawing.finish()
        drawn.wait(PATIENCE)


class Drawing:
    """The thread that draws a bar; ``ended`` is called in it."""

    def __init__(self, call: Invocation, what: str, total: int, ended: Callable[[], None]) -> None:
        self._call = call
        self._what = what
        self._total = total
        self._ended = ended
        self._done = 0
        self._finished = False
        self._changed = threading.Event()
        threading.Thread(target=self._draw, name="bar", daemon=True).start()

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._changed.set()

    def finish(self) -> None:
        """Have the bar taken away."""
        self._finished = True
        self._changed.set()

    def _draw(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody looks at it
            self._show()
        self._ended()

    def _show(self) -> None:
        call, shown = self._call, 0
        with progress(call.stderr, self._what, self._total, environ=call.environ) as advance:
            while not self._finished or shown < self._done:
                self._changed.wait()
                self._changed.clear()
                while shown < self._done:
                    advance()
                    shown += 1
