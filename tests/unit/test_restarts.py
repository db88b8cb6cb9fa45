"""Restarts that are under way, on disk."""

from __future__ import annotations

import io
import json
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from paper_xen import Xen

from chaos import config as configuration
from chaos.destroy import destroy as end
from chaos.domains import find
from chaos.invocation import Invocation
from chaos.registry import RUNNING, Record, Registry
from chaos.restarts import Restart, Restarts
from chaos.verbs import destroy
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

ONE, TWO = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"


@pytest.fixture
def restarts(tmp_path: Path) -> Restarts:
    return Restarts(Registry(str(tmp_path)))


def restart(tmp_path: Path, uuid: str, name: str) -> Restart:
    path = tmp_path / f"{name}.cfg"
    vif = "mac=00:16:3e:00:00:01,bridge=xenbr0"
    path.write_text(f'name="{name}"\nkernel="/k"\nvif=["{vif}"]\nnoxs_metadata="blob"\n')
    return Restart(uuid, configuration.load(str(path), [])[0], 3)


def test_what_is_written_is_found_again(tmp_path: Path, restarts: Restarts) -> None:
    assert restarts.all() == []
    one = restart(tmp_path, ONE, "one")
    restarts.write(one)
    assert restarts.all() == [one]
    assert restarts.holds(ONE)
    assert not restarts.holds(TWO)
    assert restarts.drop(ONE)
    assert not restarts.drop(ONE)
    assert restarts.all() == []


def test_they_are_called_off_by_name_and_by_uuid(tmp_path: Path, restarts: Restarts) -> None:
    one, two = restart(tmp_path, ONE, "one"), restart(tmp_path, TWO, "two")
    restarts.write(one)
    restarts.write(two)
    assert restarts.call_off("three") == []
    assert restarts.call_off("one") == [one]
    assert restarts.call_off("one") == []
    assert restarts.call_off(TWO.upper().replace("-", "")) == [two]
    restarts.write(one)
    restarts.write(two)
    assert {each.uuid for each in restarts.call_off()} == {ONE, TWO}


class Host:
    """A host, and ``chaos destroy`` on it."""

    def __init__(self, names: Registry) -> None:
        self.xen = Xen()
        self.names = names
        self.told: list[Any] = []
        self.on_told: Callable[..., None] = lambda *_: None

    def destroy(self, *domains: str, everything: bool = False) -> list[tuple[str, int | None]]:
        """The names and domids of what was destroyed or called off."""
        args = Namespace(domains=[*domains], all=everything, force=False, json=True, quiet=False)
        out = io.StringIO()
        call = Invocation(args, self.xen.host, self.names, stdout=out, stderr=io.StringIO())
        call.report = self._tell
        assert destroy.run(call) == 0
        return [(each["name"], each["domid"]) for each in json.loads(out.getvalue())]

    def _tell(self, *what: object) -> None:
        self.told.append(what)
        self.on_told(*what)

    def guest(self, uuid: str, name: str) -> int:
        domid = self.xen.create(uuid)
        self.names.reserve(Record(uuid, name, RUNNING, domid)).close()
        return domid


@pytest.mark.parametrize("by", ["name", "uuid", "domid", "all"])
def test_a_destroy_calls_a_restart_off(tmp_path: Path, restarts: Restarts, by: str) -> None:
    host = Host(Registry(str(tmp_path)))
    host.names.prepare()
    domid = host.guest(ONE, "one")
    wanted = {"name": "one", "uuid": ONE, "domid": str(domid)}
    words = [wanted[by]] if by in wanted else []
    one = replace(restart(tmp_path, ONE, "one"), domid=domid)
    restarts.write(one)
    # The dead domain is still there.
    assert host.destroy(*words, everything=by == "all") == [("one", domid)]
    assert host.told == [("one", 1, 1)]
    assert restarts.all() == []
    # It is gone by now, and waits.
    restarts.write(one)
    assert host.destroy(*words, everything=by == "all") == [("one", None)]
    assert restarts.all() == []
    if words:
        with pytest.raises(StateError, match="no domain"):
            host.destroy(*words)


def test_all_are_destroyed_though_one_ends_by_itself_meanwhile(
    tmp_path: Path, restarts: Restarts
) -> None:
    host = Host(Registry(str(tmp_path)))
    host.names.prepare()
    first, second = host.guest(ONE, "one"), host.guest(TWO, "two")
    assert restarts.all() == []

    def crash(*_: object) -> None:
        if second in host.xen.domains:
            end(host.xen.host, host.names, find(host.xen.host, host.names, TWO))

    host.on_told = crash
    assert host.destroy(everything=True) == [("one", first)]
    assert host.destroy(everything=True) == []


def test_a_number_that_another_domain_has_is_that_domain_s(
    tmp_path: Path, restarts: Restarts
) -> None:
    host = Host(Registry(str(tmp_path)))
    host.names.prepare()
    domid = host.guest(TWO, "two")
    one = replace(restart(tmp_path, ONE, "one"), domid=domid)
    restarts.write(one)
    assert host.destroy(str(domid)) == [("two", domid)]
    assert restarts.all() == [one]


def test_what_cannot_be_read_is_dropped(tmp_path: Path, restarts: Restarts) -> None:
    one = restart(tmp_path, ONE, "one")
    restarts.write(one)
    directory = tmp_path / "restarts"
    for number, text in enumerate(("", "[]", "{}", '{"config": {"nonsense": 1}, "failures": 0}')):
        (directory / f"{number}.json").write_text(text)
    (directory / f"{TWO}.json.new").write_text("torn")
    assert restarts.all() == [one]
    restarts.sweep()
    assert [path.name for path in directory.iterdir()] == [f"{ONE}.json"]


def test_a_full_disk_is_told(tmp_path: Path, restarts: Restarts) -> None:
    (tmp_path / "restarts").write_text("no directory")
    with pytest.raises(StateError, match="cannot write "):
        restarts.write(restart(tmp_path, ONE, "one"))
