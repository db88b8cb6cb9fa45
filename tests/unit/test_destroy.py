"""A destroy while others work on the domain."""

from __future__ import annotations

import errno
import io
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import pytest
from paper_xen import Xen

from chaos import registry, vif
from chaos.destroy import destroy
from chaos.domains import find
from chaos.domconfig import DomainConfig
from chaos.invocation import Invocation
from chaos.registry import ENDING, RUNNING, SHELL, Entry, Record, Registry
from chaos.restarts import Restart, Restarts
from chaos.verbs import destroy as verb
from xenctypes.errors import BusError, StateError

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


@pytest.mark.parametrize("state", [RUNNING, SHELL])
@pytest.mark.parametrize("locked", [False, True])
def test_a_successor_that_has_the_uuid_by_then_lives(
    other: Other, monkeypatch: pytest.MonkeyPatch, state: str, *, locked: bool
) -> None:
    other.write(ENDING)
    lock = Entry.lock
    held: list[Entry] = []

    def waited(entry: Entry, *, wait: bool) -> bool:
        if wait:
            monkeypatch.setattr(Entry, "lock", lock)
            other.end()
            domid = other.xen.create(UUID)
            told = domid if state == RUNNING else -1  # a shell on its way need not say it
            held.append(other.names.reserve(Record(UUID, "one", state, told)))
            if not locked:  # by who makes its store
                held.pop().close()
            return True
        return lock(entry, wait=wait)

    monkeypatch.setattr(Entry, "lock", waited)
    other.destroy()
    for entry in held:
        entry.close()
    assert len(other.xen.domains) == 1
    assert other.xen.calls["domain_destroy"] == 1
    assert other.names.uuid_of("one") == UUID
    record = other.names.read(UUID)
    assert record is not None
    assert record.state == state


def test_no_room_for_records_hinders_no_end(other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    other.entry.close()
    error = OSError(errno.EIO, "broken")

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(registry, "_write_atomically", full)
    with pytest.raises(OSError, match="broken"):
        other.destroy()
    assert other.xen.domains
    error = OSError(errno.ENOSPC, "full")
    other.destroy()
    assert other.xen.domains == {}
    assert other.names.uuids() == []


class Teardown:
    """``chaos destroy`` where vifs cannot be taken away, a number of times."""

    def __init__(self, other: Other, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
        self.other = other
        self.failures = failures
        other.record.macs = ["00:16:3e:00:00:01"]
        other.write(RUNNING)
        other.entry.close()
        monkeypatch.setattr(vif, "disconnect_all", self.disconnect)

    def disconnect(self, *_: object) -> None:
        self.failures -= 1
        if self.failures >= 0:
            raise BusError("noxsd is away")

    def run(self, *domains: str) -> int:
        args = Namespace(domains=[*domains], all=not domains, force=False, json=True, quiet=True)
        out, err = io.StringIO(), io.StringIO()
        other = self.other
        return verb.run(Invocation(args, other.xen.host, other.names, stdout=out, stderr=err))


@pytest.mark.parametrize("waited", [False, True])
@pytest.mark.parametrize("words", [(), ("one",)])
def test_a_teardown_that_fails_is_told(
    other: Other, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], *, waited: bool
) -> None:
    teardown = Teardown(other, monkeypatch, failures=3)
    if waited:  # for its restart, which is called off
        config = DomainConfig(name="one", memory=4)
        Restarts(other.names).write(Restart(UUID, config, 0, other.record.domid))
    with pytest.raises(BusError, match="noxsd is away"):
        teardown.run(*words)
    record: Any = other.names.read(UUID)
    assert record.state == ENDING
    assert other.xen.domains == {}


def test_a_teardown_that_is_made_good_at_once_is_none(
    other: Other, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Teardown(other, monkeypatch, failures=1).run() == 0
    assert other.names.uuids() == []
