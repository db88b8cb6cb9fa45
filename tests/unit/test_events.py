"""The daemon's events: tokens, gaps, slow subscribers."""

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from chaos.daemon import events as module
from chaos.daemon.events import Events


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in found]


@given(st.integers(0, 30), st.integers(0, 30))
def test_a_token_continues_where_it_was_given(before: int, after: int) -> None:
    events = Events()
    for number in range(before):
        events.emit(f"b{number}")
    token = f"{events.epoch}-{events.count}"
    for number in range(after):
        events.emit(f"a{number}")
    assert kinds(events.since(token)) == [f"a{number}" for number in range(after)]
    assert len(events.since("")) == before + after


def test_what_is_no_longer_kept_is_a_gap() -> None:
    events = Events()
    for number in range(module.KEPT + 2):
        events.emit(f"e{number}")
    found = events.since("")
    assert kinds(found)[:2] == ["gap", "e2"]
    assert kinds(events.since(found[-1]["token"])) == []
    assert kinds(events.since(found[1]["token"]))[0] == "e3"


def test_another_daemon_s_token_is_a_gap() -> None:
    events = Events()
    events.emit("one")
    for token in ("abc-1", "abc", "-", "0-99999999999999999999"):
        assert kinds(events.since(token)) == ["gap", "one"]


def test_a_slow_subscriber_hears_of_a_gap() -> None:
    async def main() -> list[str]:
        events = Events()
        subscription = events.subscribe(None)
        first = asyncio.ensure_future(anext(subscription))
        await asyncio.sleep(0)
        for number in range(module.BACKLOG + 5):
            events.emit(f"e{number}")
        events.close()
        return kinds([await first, *[event async for event in subscription]])

    found = asyncio.run(main())
    assert "gap" in found
    assert found[-1] == f"e{module.BACKLOG + 4}"
