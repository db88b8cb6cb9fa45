"""What `chaos create --count` makes of its command line, and when `create -F` ends."""

from __future__ import annotations

import asyncio
import io
from argparse import Namespace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from chaos.daemon.creating import Batch, _stay
from chaos.daemon.events import BACKLOG, Events
from chaos.domconfig import DomainConfig
from chaos.verbs.create import members

UUID = "00000000-0000-4000-8000-00000000000a"
OTHER = "00000000-0000-4000-8000-00000000000b"


def names(configured: str, *overrides: str, name: str | None = None, count: int = 0) -> list[str]:
    args = Namespace(name=name, count=count or None)
    return [member.name(configured) for member in members(args, list(overrides))]


def test_names_are_numbered() -> None:
    assert names("web") == ["web"]
    assert names("web", count=2) == ["web-1", "web-2"]
    assert names("w{n}b", count=2) == ["w1b", "w2b"]
    assert names("web", name="fw-{n}", count=2) == ["fw-1", "fw-2"]
    assert names("web", name="fw", count=2) == ["fw-1", "fw-2"]
    assert names("web", name="fw-{n}") == ["fw-{n}"]
    # The overrides were numbered before the configuration was read.
    assert names("a1", 'name="a{n}"', count=1) == ["a1"]
    assert names("a1", 'name="a{n}"', name="b", count=1) == ["b-1"]
    assert names("web", 'extra="name={n}"', count=2) == ["web-1", "web-2"]


def test_overrides_are_numbered() -> None:
    text = "vif=['ip=10.0.0.{n}/8']"
    found = list(members(Namespace(name=None, count=3), [text, "memory=8"]))
    assert [member.overrides for member in found] == [
        [f"vif=['ip=10.0.0.{n}/8']", "memory=8"] for n in (1, 2, 3)
    ]
    (alone,) = members(Namespace(name=None, count=None), [text])
    assert alone.overrides == [text]


class Stay:
    """A ``create -F`` that stays with domain 1, and the daemon around it."""

    def __init__(self) -> None:
        self.events = Events()
        self.held: set[str] = set()
        self.guests: dict[str, Any] = {}
        self.alive(1)
        self.out, self.err = io.StringIO(), io.StringIO()
        guests = SimpleNamespace(
            by_uuid=self.guests, restarts=SimpleNamespace(holds=self.held.__contains__)
        )
        call: Any = SimpleNamespace(
            daemon=SimpleNamespace(events=self.events, guests=guests),
            args=SimpleNamespace(quiet=False),
            print=lambda line: self.out.write(f"{line}\n"),
            stderr=self.err,
            drain=self.drain,
        )
        shell, config = SimpleNamespace(uuid=UUID, domid=1), SimpleNamespace(name="web")
        delivery: Any = SimpleNamespace(shell=shell, config=config)
        self.task = asyncio.get_running_loop().create_task(_stay(call, delivery))

    def alive(self, domid: int, **death: Any) -> None:
        """What the daemon has of the domain."""
        config = DomainConfig(name="web", memory=4, on_crash="preserve")
        info = SimpleNamespace(**death) if death else None
        self.guests[UUID] = SimpleNamespace(domid=domid, config=config, death=info)

    async def drain(self) -> None:
        """Whoever reads has read."""

    async def tell(self, *events: tuple[str, int]) -> bool:
        """Tell of events of domids; whether the command goes on."""
        await asyncio.sleep(0)  # it subscribes
        for kind, domid in events:
            word, _, action = kind.partition(":")
            more = {"action": action, "reason": "crash"} if action else {}
            self.events.emit(word, uuid=UUID, domid=domid, what="no room", **more)
        return await self.goes_on()

    async def lose(self, *events: tuple[str, int]) -> bool:
        """Have a gap in front of the events."""
        await asyncio.sleep(0)
        for _ in range(BACKLOG + 1):
            self.events.emit("ready", uuid=OTHER)
        return await self.tell(*events)

    async def goes_on(self) -> bool:
        for _ in range(BACKLOG):
            await asyncio.sleep(0)
        return not self.task.done()


LOOP = (("died:restart", 1), ("destroyed", 1), ("restart waits", 1))


@pytest.mark.parametrize(
    ("events", "status"),
    [
        ([*LOOP, ("restart called off", 1)], 0),
        ([*LOOP, ("restart failed", 1)], 1),
        ([*LOOP, ("created", 2), ("destroyed", 2)], 0),
        ([*LOOP, ("created", 2), ("died:destroy", 2), ("destroyed", 2)], 0),
        # Ended by another, who made one of the same UUID before that was told.
        ([("died:destroy", 1), ("created", 2)], 0),
        ([("died:preserve", 1)], 0),
    ],
)
def test_it_stays_until_the_end(events: list[tuple[str, int]], status: int) -> None:
    async def story() -> None:
        stay = Stay()
        for event in events[:-1]:
            assert await stay.tell(event)
        assert not await stay.tell(events[-1])
        assert await stay.task == status
        assert ("no room" in stay.err.getvalue()) == bool(status)

    asyncio.run(story())


def test_what_it_did_not_hear_of_it_looks_for() -> None:
    async def story() -> None:
        stay = Stay()
        stay.alive(2)  # restarted; the end of the first is told of late
        assert await stay.lose(("destroyed", 1))
        assert not await stay.tell(("destroyed", 2))
        stay = Stay()
        stay.guests.clear()
        stay.held.add(UUID)
        assert await stay.tell()
        assert await stay.lose(("destroyed", 1))
        stay.held.clear()
        assert not await stay.lose()
        assert await stay.task == 0
        stay = Stay()
        assert await stay.tell()
        stay.alive(1, shutdown_reason=3)  # on_crash: it is preserved
        assert not await stay.lose()

    asyncio.run(story())


def test_what_is_taken_back_does_not_come_back() -> None:
    """Its death may be dealt with already, before its end or while that goes on."""
    planned: set[str] = {UUID}

    async def end(uuid: str) -> None:
        assert planned == set()
        planned.add(uuid)  # its death is noticed

    async def take_back() -> None:
        guests = SimpleNamespace(end=end, restarts=SimpleNamespace(drop=planned.discard))
        batch = Batch(cast("Any", SimpleNamespace(daemon=SimpleNamespace(guests=guests))))
        batch.made.append(cast("Any", SimpleNamespace(shell=SimpleNamespace(uuid=UUID))))
        await batch.take_back()

    asyncio.run(take_back())
    assert planned == set()
