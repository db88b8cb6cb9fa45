"""A domain that changes its UUID, and a process that is killed in the middle of it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
from paper_xen import Xen

from chaos import afterlife, domains
from chaos.daemon.rights import Peer
from chaos.daemon.shell import DELIVERY_STEPS, Delivery, Shell
from chaos.domconfig import DomainConfig
from chaos.registry import RUNNING, SHELL, Record, Registry
from chaos.shape import shape_of
from xenctypes.errors import StateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
A = "00000000-0000-4000-8000-00000000000a"
B = "00000000-0000-4000-8000-00000000000b"
CALLS = ((os, "rename"), (os, "symlink"), (os, "unlink"), (Xen, "domain_sethandle"))


class Killed(BaseException):
    """The process ends here: nothing is undone, and its locks go."""


def killed(monkeypatch: pytest.MonkeyPatch, after: int, work: Callable[[], Any]) -> bool:
    """Do something in a process that ends behind its call of that number, if it comes so far."""
    left = after

    def limited(before: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            result = before(*args, **kwargs)
            left -= 1
            if not left:
                raise Killed
            return result

        return call

    with monkeypatch.context() as patch:
        for owner, name in CALLS:
            patch.setattr(owner, name, limited(getattr(owner, name)))
        try:
            work()
        except Killed:
            return True
    return False


def again(xen: Xen, path: str) -> Registry:
    """A daemon that starts: what it makes of what was left."""
    names = Registry(path)
    problems: list[str] = []
    domains.reap(xen.host, names, xen.domain_list(), problems, shells=True)  # type: ignore[arg-type]
    assert problems == []
    with names.locked():
        names.sweep()
    return names


@pytest.mark.parametrize("after", range(1, 7))
def test_a_dead_domain_that_is_set_aside_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    xen, names = Xen(), Registry(str(tmp_path / "run"))
    domid = xen.create(A, shutdown=True)
    record = Record(
        A, "web", state=RUNNING, domid=domid, config=DomainConfig(name="web", memory=4).as_dict()
    )
    names.reserve(record).close()
    names.reserve(Record(B, "web-1", state=RUNNING, domid=xen.create(B))).close()
    had: list[Record] = []
    cut = killed(
        monkeypatch,
        after,
        lambda: afterlife.set_aside(xen.host, Registry(names.path), A, domid, had.append),
    )
    names = again(xen, names.path)
    uuid = str(uuid_of(xen, domid))
    kept = names.read(uuid)
    assert kept is not None
    assert (kept.uuid, kept.domid) == (uuid, domid)
    assert names.uuid_of(kept.name) == uuid
    assert sorted(names.uuids()) == sorted([uuid, B])
    assert len(os.listdir(f"{names.path}/names")) == 2
    if not cut:
        assert after > 5  # or the kills were none
    if uuid != A:
        assert kept.name == "web-2"
        assert kept.config["on_crash"] == kept.config["on_poweroff"] == "preserve"
        names.reserve(Record(A, "web")).close()  # its successor has room


def uuid_of(xen: Xen, domid: int) -> UUID:
    return UUID(bytes=xen.domains[domid].uuid)


def test_what_a_set_aside_had_begun_is_gone_on_with(tmp_path: Path) -> None:
    """The call may fail in the middle, and is repeated then."""
    xen, names = Xen(), Registry(str(tmp_path / "run"))
    domid = xen.create(A, shutdown=True)
    names.reserve(Record(A, "web", state=RUNNING, domid=domid)).close()
    xen.failing["domain_sethandle"] = OSError("once")
    had: list[Record] = []
    with pytest.raises(OSError, match="once"):
        afterlife.set_aside(xen.host, names, A, domid, had.append)
    xen.failing.clear()
    uuid = afterlife.set_aside(xen.host, names, A, domid, had.append)
    assert len(had) == 1  # what was there the second time is not what the successor gets
    assert uuid == str(uuid_of(xen, domid)) == names.uuid_of("web-1")
    assert names.uuids() == [uuid]
    assert names.uuid_of("web") is None


def test_a_successor_is_not_set_aside(tmp_path: Path) -> None:
    xen, names = Xen(), Registry(str(tmp_path / "run"))
    dead, domid = xen.create(B, shutdown=True), xen.create(A)
    names.reserve(Record(A, "web", state=RUNNING, domid=domid)).close()
    with pytest.raises(StateError, match="is gone"):
        afterlife.set_aside(xen.host, names, A, dead, pytest.fail)
    assert names.uuid_of("web") == A == str(uuid_of(xen, domid))


@pytest.mark.parametrize("after", range(1, 5))
@pytest.mark.parametrize("name", ["identify", "undo"])
def test_a_shell_that_was_given_a_uuid_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, after: int
) -> None:
    xen, names = Xen(), Registry(str(tmp_path / "run"))
    names.prepare()
    mac = names.reserve_mac(None, A)
    names.add_shell(Record(A, "", state=SHELL, macs=[mac.hex(":")]))
    config = DomainConfig(name="web", memory=4, uuid=UUID(B).bytes)
    shell = Shell(xen.host, names, A, shape_of(config), [mac], 0)
    shell.domid = xen.create(A)
    delivery = Delivery(shell, config, "{}", Peer(1, 0, 0, ()))
    step = DELIVERY_STEPS[0]
    assert step.undo is not None
    if name == "undo":
        step.do(delivery)
        killed(monkeypatch, after, lambda: step.undo and step.undo(delivery))
    else:
        killed(monkeypatch, after, lambda: step.do(delivery))
    names = again(xen, names.path)
    assert xen.domains == {}
    assert names.uuids() == []
    assert os.listdir(f"{names.path}/macs") == []
