"""The toolstack's client, with a storesd in a thread."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest
from stores_host import UUID, Hardware, NoBridge, listener

from noxs.gueststores import GuestStores
from noxs.stores import Stores
from xenctypes.errors import BusError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(name="daemon")
def running_daemon(tmp_path: Path) -> Iterator[Stores]:
    hardware = Hardware(tmp_path)
    hardware.page(5)
    daemon = Stores(listener(tmp_path / "control"), hardware, NoBridge(), admit=lambda *_: True)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        yield daemon
    finally:
        daemon.stop()
        thread.join()


@pytest.fixture(name="stores")
def a_client(daemon: Stores, tmp_path: Path) -> Iterator[GuestStores]:
    with GuestStores.connect(str(tmp_path / "control")) as stores:
        yield stores


def test_what_wakes_the_loop_while_it_is_stopped_does_not_end_it_too_soon(
    daemon: Stores, stores: GuestStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.eventfd_write

    def late(fd: int, value: int) -> None:
        for _ in range(2):  # a loop that had ended with the first would not answer the second
            stores.directory("/local/domain")
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", late)
    daemon.stop()


def test_a_guest_from_begin_to_end(stores: GuestStores) -> None:
    stores.open(5, UUID % 5, "näme")
    stores.write_many([("/local/domain/5/memory/target", 1024), ("/local/domain/5/vcpu", "")])
    stores.attach(5, "vif", 0, {"mac": "00:16:3e:00:00:01", "handle": 0})
    stores.attach(5, "vif", 0, {})
    assert not stores.is_introduced(5)
    stores.introduce(5, 0, 7)
    assert stores.is_introduced(5)
    assert stores.read("/local/domain/5/name") == "näme"
    assert stores.directory("/local/domain") == ["0", "5"]
    front = "/local/domain/5/device/vif/0"
    assert stores.read(f"{front}/backend") == "/local/domain/0/backend/vif/5/0"
    assert stores.read(f"{front}/handle") == "0"
    assert stores.perms(front) == ["n5", "r0"]
    stores.write("/local/domain/5/control/shutdown", "reboot")
    assert stores.wait_for("/local/domain/5/control/shutdown", bool, 5) == "reboot"
    for _ in range(2):
        stores.detach(5, "vif", 0)
        stores.release(5)
    assert not stores.exists("/local/domain/5")


def test_errors_have_names(stores: GuestStores) -> None:
    with pytest.raises(BusError, match=r"control open 5: EINVAL") as caught:
        stores.open(5, "not a uuid", "x")
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(BusError, match=r"control attach 9: ENOENT"):
        stores.attach(9, "vif", 0, {})
    with pytest.raises(BusError, match=r"ENOSYS"), stores.transaction():
        pass


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOXS_STORES", str(tmp_path / "none"))
    with pytest.raises(BusError, match=r"storesd does not answer: .*none.*start storesd"):
        GuestStores.connect()
