"""Two who work on the same nodes at once: the second between any two requests of the first."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable

    from noxs.bus import Bus
    from noxs.nodes import Request
    from noxs.wire import Message


def interleave(bus: Bus, ours: Callable[[], object], theirs: Callable[[], object]) -> int:
    """Run ``ours`` with ``theirs`` after its first request, its second, and so on: how often.

    Requests that are sent together count as one, and those within a transaction not at all.
    """
    real, asked, turn = bus.exchange, 1, 0

    def exchange(requests: list[Request]) -> list[Message]:
        nonlocal asked
        replies = real(requests)
        asked += 1
        if asked == turn:
            theirs()
        return replies

    while asked >= turn:
        asked, turn = 0, turn + 1
        with patch.object(bus, "exchange", exchange):
            ours()
    return turn - 1
