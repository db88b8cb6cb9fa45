"""Restarts that are under way, on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chaos import config as configuration
from chaos.registry import Registry
from chaos.restarts import Restart, Restarts
from xenctypes.errors import StateError

if TYPE_CHECKING:
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
    assert restarts.call_off(TWO) == [two]
    restarts.write(one)
    restarts.write(two)
    assert {each.uuid for each in restarts.call_off()} == {ONE, TWO}


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
