"""A client's terminal on a guest's console, in the daemon."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from chaos.console import ESCAPE, IN_SIZE
from chaos.daemon.streams import Inlet, Outlet, raw

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from chaos.daemon.attachment import Attachment
    from chaos.invocation import Invocation

FLUSH_SECONDS = 1.0


async def attach(call: Invocation, attachment: Attachment) -> str:
    """Show the history, then copy both ways until one side ends it; closes ``attachment``.

    Returns "detached" after Ctrl-], "eof" when input ended, "dead" when the domain died and its
    last words are shown, "closed" when the daemon ends. Raises OSError if the output fails. The
    terminal is as it was before afterwards, also when this is cancelled.
    """
    call.stdout.flush()
    stdin = call.stdin.fileno()
    with (
        contextlib.closing(attachment),
        Outlet(call.stdout.fileno()) as out,
        Inlet(stdin) as keyboard,
        raw(stdin) as terminal,
    ):
        await out.write(attachment.history)
        showing = asyncio.ensure_future(show(out, attachment))
        typing = asyncio.ensure_future(_type(keyboard, attachment, patient=not terminal))
        try:
            await asyncio.wait({showing, typing}, return_when=asyncio.FIRST_COMPLETED)
            if showing.done():
                ending = attachment.ending
            else:
                ending = typing.result()
                attachment.close()  # ends what is shown, once all of it is
                patience = FLUSH_SECONDS if ending == "detached" else None
                await asyncio.wait({showing}, timeout=patience)
            if showing.done():
                showing.result()
                if terminal:
                    await out.write(b"\r\n")
        finally:
            for task in (showing, typing):
                task.cancel()
            await asyncio.gather(showing, typing, return_exceptions=True)
    return ending


async def show(out: Outlet, output: AsyncIterable[bytes]) -> None:
    """Write all that comes."""
    async for data in output:
        await out.write(data)


async def _type(keyboard: Inlet, attachment: Attachment, *, patient: bool) -> str:
    """Send what is typed; how that ends.

    A terminal does not wait for a guest that reads no input, lest Ctrl-] wait too: what there is
    no room for is dropped. A pipe or file waits.
    """
    while data := await keyboard.read(IN_SIZE):
        before, left, _ = data.partition(ESCAPE)
        if patient:
            await attachment.send(before)
        else:
            attachment.offer(before)
        if left:
            return "detached"
    return "eof"
