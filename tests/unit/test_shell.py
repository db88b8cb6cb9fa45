"""What a delivery does to a shell's record, and what is left when it cannot."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING

import pytest
from paper_xen import Xen

from chaos.configjson import from_dict
from chaos.daemon.rights import Peer
from chaos.daemon.shell import PAUSED_STEPS, Delivery, Shell
from chaos.domconfig import DomainConfig
from chaos.registry import RUNNING, SHELL, Record, Registry
from chaos.shape import shape_of
from chaos.steps import perform
from noxs.abi import PAGE_SIZE
from xenctypes.errors import StepError

if TYPE_CHECKING:
    from pathlib import Path

A = "00000000-0000-4000-8000-00000000000a"


@pytest.mark.parametrize("room", [0, 1, 400])
def test_a_record_that_does_not_fit_undoes_the_delivery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    xen, names = Xen(), Registry(str(tmp_path / "run"))
    names.prepare()
    names.add_shell(Record(A, "", state=SHELL))
    config = DomainConfig(name="web", memory=4)
    shell = Shell(xen.host, names, A, shape_of(config), [], 0)
    made = {
        "domid": xen.create(A), "console_port": 1, "store_port": 2, "console_frame": 3,
        "store_frame": -1, "noxs": False, "timings": [], "store": "", "disks": [],
    }  # fmt: skip
    shell.take_over(made)
    free = shell.record_size + room
    write = os.pwrite
    json = '{"name": "web", "cmdline": "' + 1000 * "x" + '"}'
    delivery = Delivery(shell, config, json, Peer(1, 0, 0, ()))
    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:free], at))
        with pytest.raises(StepError, match=r"record: .*No space left") as caught:
            perform(PAUSED_STEPS, delivery, [], subject='cannot create "web"')
    assert not getattr(caught.value, "__notes__", [])
    record = names.read(A)
    assert record is not None
    assert (record.state, record.domid) == (SHELL, shell.domid)
    assert names.uuid_of("web") is None
    perform(PAUSED_STEPS, Delivery(shell, config, json, Peer(1, 0, 0, ())), [], subject="again")
    record = names.read(A)
    assert record is not None
    assert (record.state, record.name) == (RUNNING, "web")
    shell.let_go()


def test_a_record_of_several_pages_is_not_written_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill may come between two of them."""
    xen, names = Xen(), Registry(str(tmp_path / "run"))
    names.prepare()
    names.add_shell(Record(A, "", state=SHELL))
    config = DomainConfig(name="web", memory=4, metadata=bytes(3 * PAGE_SIZE))
    shell = Shell(xen.host, names, A, shape_of(config), [], 0)
    made = {
        "domid": xen.create(A), "console_port": 1, "store_port": 2, "console_frame": 3,
        "store_frame": -1, "noxs": False, "timings": [], "store": "", "disks": [],
    }  # fmt: skip
    shell.take_over(made)
    monkeypatch.setattr(os, "pwrite", None)
    peer = Peer(1, 1000, 1000, ())
    text = json.dumps(config.as_dict())
    perform(PAUSED_STEPS, Delivery(shell, config, text, peer), [], subject="cannot create it")
    record = names.read(A)
    assert record is not None
    assert (record.state, record.owner) == (RUNNING, peer.owner)
    assert from_dict(record.config) == config
    assert os.listdir(f"{names.path}/domains/{A}") == ["domain.json"]
    monkeypatch.undo()
    path = f"{names.path}/domains/{A}/domain.json"
    assert os.path.samestat(os.fstat(shell.record_fd), os.stat(path))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left")

    # What is no longer than before can be undone where there is no room.
    monkeypatch.setattr(names, "replace_record", full)
    shell.write_record(Record(A, "", state=SHELL).to_json())
    record = names.read(A)
    assert record is not None
    assert record.state == SHELL
    with pytest.raises(OSError, match="No space"):
        shell.write_record(" " * (shell.record_size + 1))
    shell.let_go()
