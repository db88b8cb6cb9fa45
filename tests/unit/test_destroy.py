"""A destroy while others work on the domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from paper_xen import Xen

from chaos.destroy import destroy
from chaos.domains import find
from chaos.registry import ENDING, RUNNING, Entry, Record, Registry
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

UUID = "11111111-1111-4111-8111-111111111111"


class Other:
    """A command that has a domain's lock, and what it does while somebody waits for that."""

    def __init__(self, names: Registry, xen: Xen) -> None:
        self.names = names
        self.xen = xen
        self.record = Record(UUID, "one", RUNNING, xen.create(UUID))
        names.reserve(self.record).close()
        self.entry = names.entry(UUID)
        assert self.entry.lock(wait=False)

    def write(self, state: str) -> None:
        self.record.state = state
        self.entry.write(self.record)

    def end(self) -> None:
        self.xen.domain_destroy(self.record.domid)
        self.names.forget(self.entry, self.record)
        self.entry.close()

    def destroy(self) -> None:
        """What somebody else asks for."""
        destroy(self.xen.host, self.names, find(self.xen.host, self.names, "one"))


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Other]:
    names = Registry(str(tmp_path))
    names.prepare()
    other = Other(names, Xen())
    yield other
    other.entry.close()


@pytest.mark.parametrize("how", ["end", "die"])
def test_it_waits_for_whoever_ends_the_domain_already(
    other: Other, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    other.write(ENDING)
    lock = Entry.lock

    def waited(entry: Entry, *, wait: bool) -> bool:
        if wait:
            (other.end if how == "end" else other.entry.close)()
        return lock(entry, wait=wait)

    monkeypatch.setattr(Entry, "lock", waited)
    other.destroy()
    assert other.xen.domains == {}
    assert other.xen.calls["domain_destroy"] == 1
    assert other.names.uuids() == []


def test_what_is_being_made_or_changed_is_left_alone(other: Other) -> None:
    with pytest.raises(StateError, match="is being created or changed"):
        other.destroy()
    assert list(other.xen.domains) == [other.record.domid]
