"""Progress of what the daemon does for a command, on the terminal of its client."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING

from chaos.progress import progress

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from chaos.invocation import Invocation

PATIENCE = 1.0
"""Seconds that a bar has to go away; whether a terminal is one may take for ever to find out."""


@contextlib.asynccontextmanager
async def bar(call: Invocation, what: str, total: int) -> AsyncIterator[Callable[[], None]]:
    """A progress bar on the client's terminal, which a thread of its own draws."""
    if total == 1 or getattr(call.args, "quiet", False):
        yield lambda: None
        return
    done = 0
    changed, finished = threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()
    drawing = loop.create_future()

    def draw() -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody looks at it
            show()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(drawing.set_result, None)

    def show() -> None:
        drawn = 0
        with progress(call.stderr, what, total, environ=call.environ) as advance:
            while not finished.is_set() or drawn < done:
                changed.wait()
                changed.clear()
                while drawn < done:
                    advance()
                    drawn += 1

    def advance() -> None:
        nonlocal done
        done += 1
        changed.set()

    threading.Thread(target=draw, name="bar", daemon=True).start()
    try:
        yield advance
    finally:
        finished.set()
        changed.set()
        await asyncio.wait({drawing}, timeout=PATIENCE)
