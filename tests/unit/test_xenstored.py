"""What xl is told of names, while the guest's end comes in between."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
from interleaving import interleave
from noxsd_process import Noxsd

from chaos import xenstored
from chaos.daemon.core import announce
from chaos.registry import ENDING, RUNNING, Record, Registry
from noxs import bus as buses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chaos.host import Host

UUID = "00000000-0000-4000-8000-000000000001"
NAME = "/local/domain/7/name"


class Bus:
    """A bus whose writes are followed by what somebody else does."""

    def __init__(self) -> None:
        self.nodes: dict[str, str] = {}
        self.then: Callable[[], object] = lambda: None

    def write(self, path: str, value: str) -> None:
        self.nodes[path] = value
        self.then()

    def rm(self, path: str) -> None:
        self.nodes.pop(path, None)

    def children(self, path: str) -> list[str] | None:
        return [node for node in self.nodes if node.startswith(f"{path}/")] or None


@pytest.fixture
def names(tmp_path: Path) -> Registry:
    names = Registry(str(tmp_path))
    names.prepare()
    names.add_shell(Record(UUID, "one", state=RUNNING, domid=7))
    return names


@pytest.fixture
def told(names: Registry, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, str]]:
    """A function that announces the guest; what it is given happens after the first write."""
    monkeypatch.setattr(xenstored, "serves", lambda _host: True)

    def told(change: dict[str, str]) -> dict[str, str]:
        bus = Bus()

        def then() -> None:
            bus.then = lambda: None
            with names.entry(UUID) as entry:
                entry.write(Record(**{"uuid": UUID, "name": "one", "state": RUNNING} | change))

        bus.then = then
        host: Any = SimpleNamespace(bus=bus)
        announce(host, names, 7, UUID)
        return bus.nodes

    return told


def test_xl_is_told_a_name(told: Callable[[Any], dict[str, str]]) -> None:
    assert told({}) == {NAME: "one"}


def test_a_rename_meanwhile_wins(told: Callable[[Any], dict[str, str]]) -> None:
    assert told({"name": "two"}) == {NAME: "two"}


def test_nothing_stays_of_a_guest_that_ends_meanwhile(
    told: Callable[[Any], dict[str, str]],
) -> None:
    assert told({"state": ENDING}) == {}


def test_two_withdraw_a_name_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who destroys a guest, and who finds that it ended as he announced it."""
    monkeypatch.setattr(xenstored, "serves", lambda _host: True)
    noxsd = Noxsd(tmp_path).start()
    try:
        with buses.Bus.connect(noxsd.socket) as bus, buses.Bus.connect(noxsd.socket) as other:
            one, two = (cast("Host", SimpleNamespace(bus=each)) for each in (bus, other))

            def ours() -> None:
                bus.write(NAME, "one")
                xenstored.withdraw(one, 7)
                assert not bus.exists("/local/domain/7")

            assert interleave(bus, ours, lambda: xenstored.withdraw(two, 7)) > 3
    finally:
        noxsd.kill()
