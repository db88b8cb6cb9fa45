"""A stock guest's store from its opening to its release, with a real storesd and a real noxsd."""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from noxsd_process import Noxsd
from paper_xen import Xen
from stores_host import UUID, Hardware, NoBridge, listener

from chaos import backend, config, control, disk, store, vif
from chaos.afterlife import successor
from chaos.control import Request
from chaos.destroy import end, strip
from chaos.diskspec import parse_disk
from chaos.domconfig import DomainConfig
from chaos.registry import RUNNING, Record, Registry
from chaos.steps import perform
from chaos.store import PRIVATE, SHARED, Tenancy
from chaos.verbs import block, network, targets
from noxs import gueststores, hotplug
from noxs.abi import ACK_OK, REQUEST_REBOOT
from noxs.bus import Bus
from noxs.gueststores import GuestStores
from noxs.stores import Stores
from xenctypes.errors import (
    BusError,
    CallFailed,
    ConfigError,
    DeviceError,
    PermissionDenied,
    StateError,
    StepError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAC = b"\x00\x16\x3e\x00\x00\x05"
FRONT, BACK = "/local/domain/5/device/vif/0", "/local/domain/0/backend/vif/5/0"
DISK_FRONT = "/local/domain/5/device/vbd/51712"
DISK_BACK = "/local/domain/0/backend/vbd/5/51712"
CFG = 'name="web"; memory=64; kernel="k"; vcpus=2; vif=["bridge=br7, mtu=1400, untrusted"]'


@pytest.fixture(name="bus")
def dom0_bus(tmp_path: Path) -> Iterator[Bus]:
    noxsd = Noxsd(tmp_path).start()
    with Bus.connect(noxsd.socket) as bus:
        yield bus
    noxsd.kill(signal.SIGTERM)


@pytest.fixture(name="stores")
def running_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GuestStores]:
    path = tmp_path / "stores"
    monkeypatch.setenv("NOXS_STORES", str(path))
    lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    hardware = Hardware(tmp_path)
    hardware.page(5)
    daemon = Stores(listener(path), hardware, NoBridge(), admit=lambda *_: True)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        with GuestStores.connect() as stores:
            yield stores
    finally:
        daemon.stop()
        thread.join()
        os.close(lock)


@pytest.fixture(name="host")
def a_host(bus: Bus, stores: GuestStores, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(hotplug, "running", lambda: True)
    return SimpleNamespace(bus=bus, stores=stores)


@pytest.fixture
def xendevd(bus: Bus) -> Iterator[list[str]]:
    """Plugs vif and disk as soon as there is one: with the status in the list, and the cause."""
    says = [hotplug.CONNECTED, ""]
    ended = threading.Event()

    def plug() -> None:
        with Bus.connect(bus.path) as own:
            for path in (BACK, DISK_BACK):
                own.watch(path, path)
            while not ended.is_set():
                for path in {token for _, token in own.events(0.1)}:
                    if own.get(f"{path}/{hotplug.STATUS}") == hotplug.PENDING:
                        own.write(f"{path}/{hotplug.ERROR_TEXT}", says[1])
                        own.write(f"{path}/{hotplug.STATUS}", says[0])

    thread = threading.Thread(target=plug)
    thread.start()
    yield says
    ended.set()
    thread.join()


def tenancy(host: Any, service: str) -> Tenancy:
    settings = config.from_document(config.xlcfg.parse(CFG, "t"))[0]
    return Tenancy(host, service, 5, UUID % 5, settings, [MAC], 7, 9)


def record(service: str) -> Record:
    return Record(UUID % 5, "web", domid=5, store=service, macs=[MAC.hex(":")])


def test_a_private_store(host: Any, xendevd: list[str]) -> None:
    perform(store.STEPS, tenancy(host, PRIVATE), [], subject="s")
    bus, stores = host.bus, host.stores
    assert stores.is_introduced(5)
    base = "/local/domain/5"
    assert stores.read(f"{base}/memory/target") == "65536"
    assert stores.read(f"{base}/cpu/1/availability") == "online"
    seen = {key: stores.read(f"{FRONT}/{key}") for key in stores.directory(FRONT)}
    assert seen == {
        "backend": BACK, "backend-id": "0", "handle": "0", "mac": MAC.hex(":"), "mtu": "1400",
        "trusted": "0", "state": "1",
    }  # fmt: skip
    assert seen == {key: bus.read(f"{FRONT}/{key}") for key in bus.directory(FRONT)}
    assert bus.read(f"{BACK}/frontend") == FRONT
    assert bus.read(f"{BACK}/domain") == "web"
    assert bus.read(f"{BACK}/state") == "1"
    assert stores.directory(f"{base}/device") == ["suspend", "vif"]
    store.rename(host, Record(UUID % 5, "other", domid=5, store=PRIVATE))
    assert stores.read(f"{base}/name") == "other"
    for _ in range(2):
        for take in strip(host, 5, record(PRIVATE)):
            take()
    assert not stores.exists(base)
    assert not bus.exists(base)
    assert not bus.exists("/local/domain/0/backend/vif/5")


@pytest.mark.parametrize("served", [PRIVATE, SHARED])
def test_a_shell_is_told_its_name_and_addresses(host: Any, xendevd: list[str], served: str) -> None:
    """Whose vif is plugged already, and stays so."""
    bus, mac = host.bus, b"\x00\x16\x3e\x00\x00\x06"
    base, vm = "/local/domain/5", f"/vm/{UUID % 5}"
    shell = tenancy(host, served)
    shell.config = replace(shell.config, name="shell")
    perform(store.STEPS[:2], shell, [], subject="s")
    named = tenancy(host, served)
    named.macs = [mac]
    perform(store.LATE_STEPS, named, [], subject="s")
    nodes = bus if served == SHARED else host.stores
    assert [nodes.read(f"{path}/name") for path in (base, vm)] == ["web", "web"]
    assert nodes.read(f"{FRONT}/mac") == bus.read(f"{BACK}/mac") == mac.hex(":")
    assert bus.read(f"{BACK}/domain") == "web"
    assert bus.read(f"{BACK}/{hotplug.STATUS}") == hotplug.CONNECTED
    if served == SHARED:
        assert bus.perms(FRONT) == ["n5", "r0"]
    store.release(host, served, 5, UUID % 5)
    assert not nodes.exists(vm)


@pytest.mark.parametrize("served", [PRIVATE, SHARED])
def test_a_shell_is_given_its_disks_late(host: Any, xendevd: list[str], served: str) -> None:
    """One that cannot be set up leaves the shell as it was."""
    bus = host.bus
    nodes = bus if served == SHARED else host.stores
    perform(store.STEPS[:2], tenancy(host, served), [], subject="s")
    bus.write(f"{DISK_BACK}/stale", "")  # of whoever had the domid before
    named = tenancy(host, served)
    disks = config.from_document(config.xlcfg.parse(f"{CFG}; disk=['/image,raw,xvda,rw']", "t"))
    named.config = disks[0]
    named.targets = [disk.Target(hotplug.TYPE_FILE, "file:1:2", "file:1:2")]
    perform(store.LATE_STEPS + store.DISK_STEPS, named, [], subject="s")
    assert nodes.read(f"{DISK_FRONT}/backend") == DISK_BACK
    assert bus.read(f"{DISK_BACK}/params") == "/image"
    assert not bus.exists(f"{DISK_BACK}/stale")
    if served == SHARED:
        assert bus.perms(DISK_FRONT) == ["n5", "r0"]
    xendevd[:] = [hotplug.ERROR, "/image: Input/output error"]
    with pytest.raises(StepError, match="attach disks: disk xvda: /image: Input/output error"):
        perform(store.DISK_STEPS, named, [], subject="s")
    assert not bus.exists("/local/domain/0/backend/vbd/5")
    assert bus.read(f"{BACK}/{hotplug.STATUS}") == hotplug.CONNECTED
    store.release(host, served, 5, UUID % 5)


def test_a_shared_one(host: Any, xendevd: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nodes, with libxl's permissions; introducing is xenstored's."""
    bus = host.bus
    bus.write("/local/domain/5/stale", "")  # of whoever had the domid before
    perform(store.STEPS[:2], tenancy(host, SHARED), [], subject="s")
    perms = {
        "/local/domain/5": ["n0", "r5"],
        "/local/domain/5/name": ["n0", "r5"],
        "/local/domain/5/data": ["n5"],
        "/local/domain/5/control/shutdown": ["n5"],
        "/local/domain/5/device/vif": ["n0", "r5"],
        "/local/domain/5/device/suspend": ["n0", "r5"],
        FRONT: ["n5", "r0"],
        BACK: ["n0", "r5"],
        f"/vm/{UUID % 5}": ["n0", "r5"],
    }
    assert {path: bus.perms(path) for path in perms} == perms
    assert not bus.exists("/local/domain/5/stale")
    assert bus.read("/local/domain/5/memory/static-max") == "65536"
    monkeypatch.setattr(Bus, "release", lambda *_: None)
    for take in strip(host, 5, record(SHARED))[-2:]:
        take()
    assert not bus.exists("/local/domain/5")
    assert not bus.exists("/local/domain/0/backend/vif/5")


def test_what_cannot_be_plugged_is_undone(host: Any, xendevd: list[str]) -> None:
    xendevd[:] = [hotplug.ERROR, "no bridge br7"]
    wanted = tenancy(host, PRIVATE)
    with pytest.raises(StepError, match="attach devices: vif 0: no bridge br7"):
        perform(store.STEPS, wanted, [], subject="s")
    assert wanted.gone
    assert not host.stores.exists("/local/domain/5")
    assert not host.bus.exists("/local/domain/0/backend/vif/5")


def test_without_storesd(host: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert store.service(host) == PRIVATE
    monkeypatch.setenv("NOXS_STORES", str(tmp_path / "none"))
    assert store.service(host) == ""
    settings = tenancy(host, PRIVATE).config
    with pytest.raises(DeviceError, match="storesd is not running"):
        store.check(settings, "")
    store.check(settings, PRIVATE)
    assert not gueststores.running()
    assert not store.release(host, PRIVATE, 5, UUID % 5)  # what is not there holds nothing


def test_a_request_is_answered_by_taking_it_away(host: Any, monkeypatch: Any) -> None:
    host.stores.open(5, UUID % 5, "web")
    asked = Request(record(PRIVATE), REQUEST_REBOOT, None)
    looker = SimpleNamespace(_host=host)
    store.request(host, asked.record, control.WORDS[asked.code])
    control.Control._look(looker, asked)  # type: ignore[arg-type]
    assert (asked.rung, asked.result, asked.problem()) == (True, None, "has not answered")
    host.stores.write("/local/domain/5/control/shutdown", "")
    control.Control._look(looker, asked)  # type: ignore[arg-type]
    assert asked.result == ACK_OK


class Ctrl:
    """Remembers what is done to a domain."""

    def __init__(self, calls: list[str], failing: str = "") -> None:
        self.calls = calls
        self.failing = failing

    def domain_pause(self, _domid: int) -> None:
        self.calls.append("pause")
        if self.failing:
            raise CallFailed(self.failing, 3)

    def domain_destroy(self, _domid: int) -> None:
        self.calls.append("destroy")


@pytest.mark.parametrize("failing", ["", "xc_domain_pause"])
def test_an_end_does_all_it_can(host: Any, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    calls: list[str] = []
    host.ctrl = Ctrl(calls, failing)
    monkeypatch.setattr(store, "release", lambda *_: calls.append("release"))
    monkeypatch.setattr("chaos.vif.disconnect_all", lambda *_: calls.append("vifs"))
    info: Any = SimpleNamespace(domid=5, dying=False)
    if failing:
        with pytest.raises(CallFailed):
            end(host, info, record(PRIVATE))
        assert calls == ["pause", "release", "vifs", "destroy"]
        return
    end(host, info, record(PRIVATE))
    assert calls == ["pause", "release", "vifs", "destroy", "release"]
    calls.clear()
    end(host, info, record(SHARED))
    assert calls == ["pause", "vifs", "release", "destroy"]
    calls.clear()
    end(host, info, Record(UUID % 5, "bare", domid=5))
    assert calls == ["destroy"]


@pytest.mark.parametrize(
    ("text", "kib"), [("256", 1 << 18), ("1g", 1 << 20), ("2048k", 2048), ("64MB", 1 << 16)]
)
def test_amounts_of_memory(text: str, kib: int) -> None:
    assert targets.kibibytes(text) == kib


@pytest.mark.parametrize("text", ["", "m", "-1", "1x", "1.5g", "1000k", "0", "٣", "9" * 16])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        targets.kibibytes(text)


@pytest.mark.parametrize("text", ["", "hh", "é", "\n", "-"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        targets.letter(text)


def call(host: Any, names: Registry, verb: str, **arguments: Any) -> Any:
    args = SimpleNamespace(verb=verb, domain="web", domains=["web"], json=False, **arguments)
    said: list[str] = []
    return SimpleNamespace(
        host=host, names=names, args=args, peer=None, said=said, print=lambda *t: said.extend(t)
    )


def test_targets_are_written_within_their_bounds(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.ctrl = xen = Xen()
    names = Registry(str(tmp_path / "run"))
    asked = record(PRIVATE)
    asked.state, asked.config = RUNNING, {"maxmem": 128, "maxvcpus": 4}
    names.reserve(asked).close()
    while (domid := xen.create(asked.uuid)) != asked.domid:
        del xen.domains[domid]
    host.stores.open(5, asked.uuid, "web")
    domain = xen.domains[5]
    targets.run(call(host, names, "mem-set", memory=100 << 10))
    targets.run(call(host, names, "vcpu-set", vcpus=3))
    targets.run(call(host, names, "sysrq", key="s"))
    base = "/local/domain/5"
    assert domain.max_pages == 101 << 8
    assert host.stores.read(f"{base}/memory/target") == str(100 << 10)
    assert [host.stores.read(f"{base}/cpu/{n}/availability") for n in range(4)] == [
        "online", "online", "online", "offline",
    ]  # fmt: skip
    assert host.stores.read(f"{base}/control/sysrq") == "s"
    for verb, arguments, why in (
        ("mem-set", {"memory": 129 << 10}, "can have 128 MiB at most"),
        ("vcpu-set", {"vcpus": 0}, "1 to 4 vCPUs online, not 0"),
        ("vcpu-set", {"vcpus": 5}, "1 to 4 vCPUs online, not 5"),
    ):
        with pytest.raises(StateError, match=why):
            targets.run(call(host, names, verb, **arguments))

    def away(*_: object) -> None:
        raise BusError("away")

    monkeypatch.setattr(store, "tell", away)
    with pytest.raises(BusError, match="away"):
        targets.run(call(host, names, "mem-set", memory=64 << 10))
    monkeypatch.undo()
    assert domain.max_pages == 101 << 8
    domain.shutdown = True
    with pytest.raises(StateError, match="is dead"):
        targets.run(call(host, names, "sysrq", key="s"))
    with names.entry(asked.uuid) as entry:
        asked.store = ""
        entry.write(asked)
    with pytest.raises(StateError, match="has no store"):
        targets.run(call(host, names, "sysrq", key="s"))


@pytest.fixture
def running(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stock guest without vifs that runs, as far as anybody can tell."""
    host.ctrl = xen = Xen()
    names = Registry(str(tmp_path / "run"))
    asked = Record(UUID % 5, "web", state=RUNNING, domid=5, store=PRIVATE)
    asked.config = config.from_document(config.xlcfg.parse("name='web'; kernel='k'", "t"))[
        0
    ].as_dict()
    names.reserve(asked).close()
    while (domid := xen.create(asked.uuid)) != 5:
        del xen.domains[domid]
    host.stores.open(5, asked.uuid, "web")
    monkeypatch.setattr(vif, "check", lambda _: None)
    monkeypatch.setattr(vif, "taken_macs", lambda _: set())
    monkeypatch.setattr(disk, "BLKBACK", str(tmp_path))
    monkeypatch.setattr(backend, "CLOSE_SECONDS", 0.1)
    return SimpleNamespace(names=names, uuid=asked.uuid)


def test_a_vif_comes_and_goes(host: Any, running: Any, xendevd: list[str]) -> None:
    names = running.names
    settings = ["bridge=br7", f"mac={MAC.hex(':')}"]
    network.run(call(host, names, "network-attach", settings=settings))
    now = names.read(running.uuid)
    assert now.macs == [MAC.hex(":")]
    assert [each.bridge for each in successor(DomainConfig(name="x"), now).vifs] == ["br7"]
    assert host.stores.read(f"{FRONT}/mac") == MAC.hex(":")
    assert host.bus.read(f"{BACK}/bridge") == "br7"
    with pytest.raises(ConfigError, match="two vifs have the MAC"):
        network.run(call(host, names, "network-attach", settings=[*settings, "devid=1"]))
    with pytest.raises(StateError, match="has no vif 3"):
        network.run(call(host, names, "network-detach", vif="3"))
    host.bus.write(f"{FRONT}/event-channel", "\x1b[2J")  # which may be the guest's own words
    asked = call(host, names, "network-list")
    network.run(asked)
    assert asked.said[1].split() == ["0", "0", MAC.hex(":"), "0", "1", "-1", "-1/-1", BACK]
    network.run(call(host, names, "network-detach", vif=MAC.hex(":").upper()))
    now = names.read(running.uuid)
    assert (now.macs, now.config["vif"]) == ([], [])
    assert not host.stores.exists(FRONT)
    assert not host.bus.exists(BACK)
    assert names.reserve_mac(MAC, "another") == MAC


def test_a_vif_that_is_not_plugged_is_not_there(
    host: Any, running: Any, xendevd: list[str]
) -> None:
    xendevd[:] = [hotplug.ERROR, "no bridge br7"]
    with pytest.raises(DeviceError, match="no bridge br7"):
        network.run(call(host, running.names, "network-attach", settings=["bridge=br7"]))
    now = running.names.read(running.uuid)
    assert (now.macs, now.config["vif"]) == ([], [])
    assert not os.listdir(f"{running.names.path}/macs")
    assert not host.stores.exists(FRONT)
    assert not host.bus.exists(BACK)


def test_a_disk_of_a_dead_domain_is_nobodys(
    host: Any, running: Any, xendevd: list[str], tmp_path: Path
) -> None:
    names, image = running.names, tmp_path / "image"
    image.write_bytes(bytes(512))
    (config, _), asked = parse_disk(f"{image},raw,xvda,w"), [f"{image},raw,xvda,w"]
    dead = Record(UUID % 6, "dead", state=RUNNING, domid=host.ctrl.create(UUID % 6))
    dead.disks = [disk.entry(config, disk.look(config))]
    names.reserve(dead).close()
    with pytest.raises(DeviceError, match='is a disk of "dead" already'):
        block.run(call(host, names, "block-attach", settings=asked))
    del host.ctrl.domains[dead.domid]
    block.run(call(host, names, "block-attach", settings=asked))
    assert names.read(dead.uuid) is None
    assert [entry["vdev"] for entry in names.read(running.uuid).disks] == ["xvda"]


def test_a_disk_comes_and_goes(
    host: Any, running: Any, xendevd: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, image = running.names, tmp_path / "image"
    image.write_bytes(bytes(512))
    words = [str(image), "raw", "xvda", "w"]
    asked = call(host, names, "block-attach", settings=words)
    asked.peer = SimpleNamespace(uid=1000)
    with pytest.raises(PermissionDenied, match="only root"):
        block.run(asked)
    asked.peer = SimpleNamespace(uid=0)
    block.run(asked)
    now = names.read(running.uuid)
    assert [entry["vdev"] for entry in now.disks] == ["xvda"]
    assert successor(DomainConfig(name="x"), now).disks[0].target == str(image)
    assert host.stores.read(f"{DISK_FRONT}/virtual-device") == "51712"
    assert not host.stores.exists(f"{DISK_BACK}/params")
    assert host.bus.read(f"{DISK_BACK}/params") == str(image)
    for settings, error, why in (
        ([f"{image},raw,xvdb,r"], DeviceError, "is a disk of this domain already"),
        (["/a,raw,xvda,r"], ConfigError, "two disks have the vdev"),
        (["/a,qcow2,xvdb,r"], ConfigError, "format qcow2 is not supported"),
        (["/a,raw,xvdb,r"], DeviceError, "/a: No such file"),
        (["/a", "raw"], ConfigError, "no vdev is given"),
    ):
        with pytest.raises(error, match=why):
            block.run(call(host, names, "block-attach", settings=settings))
    asked = call(host, names, "block-list")
    block.run(asked)
    assert asked.said[1].split() == ["51712", "0", "5", "1", "-1", "-1", DISK_BACK]
    asked.args.json, asked.print_json = True, asked.said.append
    block.run(asked)
    assert asked.said[2][0] == {
        "domain": "web", "domid": 5, "devid": 51712, "backend": DISK_BACK, "dev": "xvda",
        "params": str(image), "mode": "w", "frontend-id": "5", "state": 1, "event-channel": None,
        "ring-ref": None,
    }  # fmt: skip
    with pytest.raises(StateError, match="has no disk xvdb"):
        block.run(call(host, names, "block-detach", vdev="xvdb", force=False))
    host.bus.write(f"{DISK_FRONT}/state", 4)
    with pytest.raises(StateError, match="does not close disk xvda, which is left closing"):
        block.run(call(host, names, "block-detach", vdev="xvda", force=False))
    assert host.bus.read(f"{DISK_BACK}/state") == "5"
    block.run(call(host, names, "block-detach", vdev="51712", force=True))
    now = names.read(running.uuid)
    assert (now.disks, now.config["disk"]) == ([], [])
    assert not host.stores.exists(DISK_FRONT)
    assert not host.bus.exists(DISK_BACK)

    # A guest without a driver for disks has nothing to close.
    monkeypatch.setattr(backend, "CLOSE_SECONDS", 0.0)
    block.run(call(host, names, "block-attach", settings=words))
    block.run(call(host, names, "block-detach", vdev="xvda", force=False))
    assert names.read(running.uuid).disks == []
    assert not host.bus.exists(DISK_BACK)

    xendevd[:] = [hotplug.ERROR, "no loop device"]
    with pytest.raises(DeviceError, match="no loop device"):
        block.run(call(host, names, "block-attach", settings=words))
    now = names.read(running.uuid)
    assert (now.disks, now.config["disk"]) == ([], [])
    assert not host.bus.exists(DISK_BACK)


def test_one_change_at_a_time_and_only_of_guests_with_a_store(
    host: Any, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = running.names

    def refused(why: str) -> None:
        with pytest.raises(StateError, match=why):
            network.run(call(host, names, "network-detach", vif="0"))

    with names.entry(running.uuid) as entry:
        assert entry.lock(wait=True)
        refused("being changed or destroyed")
    monkeypatch.setattr(store, "serves", lambda: False)
    refused("storesd is not running")
    now = names.read(running.uuid)
    host.ctrl.domains[5].shutdown = True
    refused("is dead")
    with names.entry(running.uuid) as entry:
        now.store = ""
        entry.write(now)
    refused("has no store")


def test_a_rename_that_waits_for_a_change_keeps_nobody_from_the_registry(running: Any) -> None:
    names, order = Registry(running.names.path), []

    def rename() -> None:
        with Registry(names.path).owning(running.uuid):
            order.append("renamed")

    with names.entry(running.uuid) as entry:
        assert entry.lock(wait=True)
        thread = threading.Thread(target=rename)
        thread.start()
        for _ in range(100):
            with names.locked():
                pass
        order.append("changed")
    thread.join()
    assert order == ["changed", "renamed"]
