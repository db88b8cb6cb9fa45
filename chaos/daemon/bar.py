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


@contextlib.asynccontextmanager
async def bar(call: Invocation, what: str, total: int) -> AsyncIterator[Callable[[], None]]:
    """A progress bar on the client's terminal, which a thread draws: terminals may stand still."""
    if total == 1 or getattr(call.args, "quiet", False) or not call.stderr.isatty():
        yield lambda: None
        return
    done = 0
    changed, finished = threading.Event(), threading.Event()

    def draw() -> None:
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

    drawing = asyncio.get_running_loop().create_task(asyncio.to_thread(draw))
    try:
        yield advance
    finally:
        finished.set()
        changed.set()
        await drawing
