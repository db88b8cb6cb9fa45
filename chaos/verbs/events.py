"""events: what happens to domains and to the pool, as it happens."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

from xenctypes.errors import StateError

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation

SHOWN = ("name", "domid", "flavour", "reason", "action", "what")


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument(
        "--since",
        metavar="TOKEN",
        help="begin after the event of that token; with an empty one: with the oldest kept",
    )
    parser.add_argument("--json", action="store_true", help="print each event as a line of JSON")


async def serve(call: Invocation) -> int:
    """Print events until the client has enough."""
    async with contextlib.aclosing(call.daemon.events.subscribe(call.args.since)) as events:
        async for event in events:
            call.print(json.dumps(event) if call.args.json else line(event))
            await call.drain()
    return 0


def run(call: Invocation) -> int:
    """Without a daemon there are no events."""
    del call
    raise StateError("no chaosd runs, and nobody else tells of events", hint="start chaosd")


def line(event: dict[str, Any]) -> str:
    """An event for people: time, what happened, to whom, and what else there is to say."""
    moment = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    fraction = f"{event['time'] % 1:.3f}"[1:]
    words = [str(event[key]) for key in SHOWN if event.get(key) not in {None, ""}]
    return f"{moment}{fraction}  {event['event']:<14} {' '.join(words)}"
