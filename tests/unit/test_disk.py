"""Disks as the toolstack sees them: what is refused and why, who has which, what the bus says."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from interleaving import interleave
from noxsd_process import Noxsd

from chaos import backend, disk
from chaos import config as configuration
from chaos.disk import PreparedDisk, Target
from chaos.diskspec import parse_disk
from chaos.registry import Record, Registry
from noxs import abi, blockdev, hotplug
from noxs.bus import Bus
from xenctypes.errors import ConfigError, DeviceError, PermissionDenied

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chaos.diskspec import DiskConfig


def parsed(text: str) -> DiskConfig:
    return parse_disk(text)[0]


@pytest.mark.parametrize(
    ("text", "cause", "hint"),
    [
        ("/a.iso,raw,hdc:cdrom,r", "CD drives are not supported", "with ro"),
        ("/a,qcow2,xvda,rw", "format qcow2 is not supported", "qemu-img convert -f qcow2"),
        ("/a,raw,xvda,rw,backendtype=qdisk", "backendtype qdisk", "leave backendtype out"),
        ("/a,raw,xvda,rw,backend=storage", "another domain", "leave backend out"),
        ("/a,raw,xvda,rw,script=block-drbd", "xendevd runs no scripts", "leave script out"),
        ("/a,raw,xvda,rw,specification=virtio", "virtio disks", "specification=xen"),
    ],
)
def test_what_disks_cannot_be(text: str, cause: str, hint: str, tmp_path: Path) -> None:
    cfg = tmp_path / "guest.cfg"
    cfg.write_text(f'name = "a"\nkernel = "k"\ndisk = ["{text}"]\n')
    config = configuration.load(str(cfg), [])[0]
    with pytest.raises(ConfigError, match=cause) as refused:
        configuration.supported(config)
    assert hint in refused.value.hint
    assert (refused.value.line, refused.value.column) == (3, 8)


@pytest.mark.parametrize(
    "text", ["/a,raw,xvda,rw", "phy:sda,xvda,r", "/a,,xvdb,r,backendtype=phy,script=block,discard"]
)
def test_what_disks_can_be(text: str) -> None:
    disk.check_supported(parsed(text))
    assert disk.path_of(parsed(text)) in {"/a", "/dev/sda"}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A host with blkback and xendevd, whose devices are described in a directory."""
    monkeypatch.setattr(disk, "BLKBACK", str(tmp_path))
    monkeypatch.setattr(disk, "SYS_BLOCK", str(tmp_path / "dev"))
    monkeypatch.setattr(disk, "MOUNTS", str(tmp_path / "mountinfo"))
    monkeypatch.setattr(hotplug, "running", lambda: True)
    (tmp_path / "mountinfo").write_text("22 1 8:3 / /srv rw - ext4 /dev/sda3 rw\n")
    return tmp_path


def image(directory: Path, name: str = "image", size: int = 512) -> Path:
    path = directory / name
    path.write_bytes(bytes(size))
    return path


def test_a_file_is_looked_at(host: Path) -> None:
    path = image(host)
    link = host / "link"
    os.link(path, link)
    found = disk.look(parsed(f"{path},raw,xvda,rw"))
    assert found == disk.look(parsed(f"{link},raw,xvdb,r"))
    assert found.type == hotplug.TYPE_FILE
    assert found.identity == found.blocks == blockdev.identity(path.stat())


def test_files_that_cannot_be_disks(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, access: str = "rw") -> str:
        with pytest.raises(DeviceError) as error:
            disk.look(parsed(f"{path},raw,xvda,{access}"))
        assert error.value.message.startswith(f"disk xvda: {path}: ")
        return str(error.value)

    path = image(host)
    assert "No such file" in refused(host / "missing")
    assert "is a directory (name a file in raw format" in refused(host)
    assert "has 511 bytes, less than a sector" in refused(image(host, "small", 511))
    path.chmod(0o400 & ~0o222)
    assert "is read-only (chmod u+w, or give the guest ro access)" in refused(path)
    disk.look(parsed(f"{path},raw,xvda,ro"))
    os.mkfifo(host / "fifo")
    assert "neither a file nor a block device" in refused(host / "fifo")
    assert "Not a directory" in refused(path / "below")
    monkeypatch.setattr(hotplug, "running", lambda: False)
    with pytest.raises(DeviceError, match="xendevd is not running"):
        disk.look(parsed(f"{path},raw,xvda,ro"))
    monkeypatch.setattr(disk, "BLKBACK", str(host / "nowhere"))
    with pytest.raises(DeviceError, match="modprobe xen-blkback"):
        disk.look(parsed(f"{path},raw,xvda,ro"))


class Device:
    """What stat says of a block device."""

    st_mode, st_dev, st_ino, st_size = 0o060660, 5, 17, 0

    def __init__(self, minor: int) -> None:
        self.st_rdev = os.makedev(8, minor)


def test_devices_that_cannot_be_disks(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, devices = os.stat, {f"/dev/sd{minor}": Device(minor) for minor in range(9)}
    monkeypatch.setattr(os, "stat", lambda path, **more: devices.get(path) or real(path, **more))

    def described(minor: int, **attributes: str) -> Path:
        base = host / f"dev/8:{minor}"
        (base / "loop").mkdir(parents=True)
        for name, value in {"ro": "0", "size": "2048", **attributes}.items():
            (base / name.replace("_", "/", 1)).write_text(f"{value}\n")
        return base

    def refused(minor: int) -> str:
        with pytest.raises(DeviceError) as error:
            disk.look(parsed(f"sd{minor},raw,xvda,rw"))
        return str(error.value)

    described(0)
    found = disk.look(parsed("sd0,raw,xvda,rw"))
    assert found == Target(hotplug.TYPE_DEVICE, "device:8:0", "device:8:0")
    described(1, ro="1")
    assert "is read-only" in refused(1)
    described(2, size="0")
    assert "has no sectors" in refused(2)
    described(3)
    assert "is mounted on /srv (umount /srv)" in refused(3)
    (described(4) / "holders/dm-0").mkdir(parents=True)
    assert "is part of dm-0" in refused(4)
    path = image(host)
    described(5, loop_backing_file=str(path))
    assert disk.look(parsed("sd5,raw,xvda,rw")).blocks == blockdev.identity(path.stat())


def test_a_partition_shares_its_disk_s_blocks(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockdev, "SYSFS_DEV", str(tmp_path))
    for minor in (1, 2):
        partition = host / "sdb" / f"sdb{minor}"
        partition.mkdir(parents=True)
        (partition / "partition").write_text(f"{minor}\n")
        (tmp_path / f"8:{16 + minor}").symlink_to(partition)
    (host / "sdb" / "dev").write_text("8:16\n")
    (tmp_path / "8:16").symlink_to(host / "sdb")
    whole, one, two = "device:8:10", "device:8:11", "device:8:12"
    assert blockdev.overlap(whole, whole)
    assert blockdev.overlap(whole, one)
    assert blockdev.overlap(two, whole)
    assert not blockdev.overlap(one, two)
    assert not blockdev.overlap("file:0:1", one)
    names = Registry(str(tmp_path / "run"))
    names.prepare()
    config = parsed("sdb1,raw,xvda,rw")
    target = Target(hotplug.TYPE_DEVICE, one, one)
    record = Record("a", "web", disks=[disk.entry(config, Target(target.type, whole, whole))])
    with (
        names.reserve(record),
        pytest.raises(DeviceError, match='is a disk of "web" already'),
    ):
        disk.check_free(names, "b", [(config, target)])


def test_a_disk_that_is_written_is_nobody_elses(host: Path, tmp_path: Path) -> None:
    names = Registry(str(tmp_path / "run"))
    names.prepare()
    writer, reader = (parsed(f"{image(host)},raw,xvda,{access}") for access in ("rw", "ro"))
    target = disk.look(writer)
    other = Target(target.type, "file:0:1", "file:0:1")

    def check(uuid: str, *disks: tuple[DiskConfig, Target]) -> None:
        disk.check_free(names, uuid, disks)

    with pytest.raises(DeviceError, match="is a disk of this domain already"):
        check("b", (writer, target), (replace(reader, vdev="xvdb"), target))
    check("b", (reader, target), (replace(reader, vdev="xvdb"), target), (writer, other))
    record = Record("a", "web", disks=[disk.entry(reader, target)])
    with names.reserve(record) as entry:
        assert disk.target_of(record.disks[0]) == target
        check("b", (reader, target))
        check("a", (writer, target))
        with pytest.raises(DeviceError, match='is a disk of "web" already'):
            check("b", (writer, target))
        record.disks = [disk.entry(writer, target)]
        entry.write(record)
        with pytest.raises(DeviceError, match='is a disk of "web" already'):
            check("b", (reader, target))
        check("b", (writer, other))


def test_only_root_has_the_daemon_give_disks_away() -> None:
    from chaos.daemon.core import Daemon
    from chaos.daemon.rights import Peer

    config = SimpleNamespace(disks=(parsed("/etc/shadow,raw,xvda,ro"),))
    asked = Daemon._made(None, SimpleNamespace(config=config), Peer(1, 1000, 1000, ()), None)  # type: ignore[arg-type]
    with pytest.raises(PermissionDenied, match="only root may create guests with disks"):
        asyncio.run(asked)


TARGET = Target(hotplug.TYPE_FILE, "file:1:2", "file:1:2")


def prepared(text: str = "/a,raw,xvda,rw", **more: Any) -> PreparedDisk:
    return PreparedDisk(parsed(text), TARGET, 1000, 2000, 8, 5, **more)


def test_what_the_bus_says_of_a_disk() -> None:
    nodes = dict(disk.nodes(7, prepared()))
    front, back = "/local/domain/7/device/vbd/51712", "/local/domain/0/backend/vbd/7/51712"
    assert nodes[f"{front}/backend"] == back
    assert nodes[f"{back}/frontend"] == front
    assert (nodes[f"{front}/ring-ref"], nodes[f"{front}/event-channel"]) == (8, 5)
    assert (nodes[f"{front}/state"], nodes[f"{back}/state"]) == ("4", "1")
    assert nodes[f"{back}/mode"] == "w"
    assert nodes[f"{back}/{hotplug.IDENTITY}"] == TARGET.identity
    assert f"{back}/{hotplug.PHYSICAL_DEVICE}" not in nodes
    (device,) = disk.devices([parsed("/a,raw,xvda,ro,untrusted")], [TARGET])
    assert device.back["mode"] == "r"
    assert device.back["discard-enable"] == 0
    assert device.front["trusted"] == 0
    assert "params" not in device.front


def test_a_guest_is_told_what_blkback_offers() -> None:
    offers = {"sectors": 2048, "info": abi.VBD_READONLY, "features": abi.VBD_FLUSH}
    vbd = prepared(offers=offers).describe()
    assert (vbd.handle, vbd.sectors, vbd.info) == (51712, 2048, abi.VBD_READONLY)
    assert vbd.queues[0] == (5, (1000,), (8,))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Noxsd(tmp_path_factory.mktemp("bus")).start()
    yield server.socket
    server.kill()


@pytest.fixture
def bus(store: str, host: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bus]:
    monkeypatch.setattr(backend, "DEVICES", str(host))
    with Bus.connect(store) as connected:
        connected.rm_many(["/local/domain/7", "/local/domain/0/backend", "/local/domain/0/error"])
        yield connected


BACK = "/local/domain/0/backend/vbd/7/51712"


def test_progress_is_waited_for_and_failures_are_told(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [prepared().config]
    bus.write_many([*disk.nodes(7, prepared()), (f"{BACK}/{hotplug.STATUS}", hotplug.CONNECTED)])
    disk.await_progress(bus, 7, configs, connected=False)
    bus.write(f"{BACK}/state", "4")
    disk.await_progress(bus, 7, configs, connected=True)
    bus.write("/local/domain/0/error/backend/vbd/7/51712/error", "22 reading  x")
    with pytest.raises(DeviceError, match="disk xvda: blkback refused it: 22 reading x"):
        disk.await_progress(bus, 7, configs, connected=True)
    bus.write_many([(f"{BACK}/{hotplug.STATUS}", hotplug.ERROR), (f"{BACK}/hotplug-error", "why")])
    with pytest.raises(DeviceError, match="disk xvda: why"):
        disk.await_progress(bus, 7, configs, connected=False)
    bus.write(f"{BACK}/{hotplug.STATUS}", hotplug.PENDING)
    bus.rm("/local/domain/0/error")
    monkeypatch.setattr(disk, "CONNECT_TIMEOUT", 0.01)
    with pytest.raises(DeviceError, match="not connected within"):
        disk.await_progress(bus, 7, configs, connected=False)
    monkeypatch.setattr(hotplug, "running", lambda: False)
    monkeypatch.setattr(disk, "RESTART_TIMEOUT", -1.0)
    with pytest.raises(DeviceError, match="xendevd ended"):
        disk.await_progress(bus, 7, configs, connected=False)


def test_offers_are_read(bus: Bus) -> None:
    said = {
        "sectors": 2049, "sector-size": 512, "info": 0, "feature-flush-cache": 1,
        "feature-barrier": 0, "feature-max-indirect-segments": 256, "feature-persistent": 1,
    }  # fmt: skip
    bus.write_many([(f"{BACK}/{key}", value) for key, value in said.items()])
    offers = disk._offers(bus, 7, 51712)
    assert (offers["sectors"], offers["max_segments"]) == (2049, 256)
    assert offers["features"] == abi.VBD_FLUSH | abi.VBD_INDIRECT
    assert prepared(offers=offers).describe().sector_size == 512


def test_a_disk_goes_with_its_nodes_and_its_loop_device(
    bus: Bus, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockdev, "SYSFS", str(host))
    behind = host / "loop3/loop/backing_file"
    behind.parent.mkdir(parents=True)
    behind.write_text("/a\n")
    both = [*disk.nodes(7, prepared()), (f"{BACK}/{hotplug.PHYSICAL_DEVICE}", "7:3")]
    bus.write_many(both)
    monkeypatch.setattr(disk, "DETACH_TIMEOUT", 0.01)
    with pytest.raises(DeviceError, match="/a is still held by loop3"):
        disk.disconnect_all(bus, 7)
    assert not bus.exists(BACK)
    assert not bus.exists("/local/domain/7")
    bus.write_many(both)
    monkeypatch.setattr(hotplug, "running", lambda: False)  # it does so when it starts
    disk.disconnect_all(bus, 7)
    monkeypatch.setattr(hotplug, "running", lambda: True)
    bus.write_many(both)
    behind.unlink()
    disk.disconnect_all(bus, 7)
    disk.disconnect_all(bus, 7)
    (host / "vbd-7-51712/driver").mkdir(parents=True)
    monkeypatch.setattr(backend, "CLOSE_TIMEOUT", 0.01)
    bus.write_many(both)
    with pytest.raises(DeviceError, match="does not let go of vbd-7-51712"):
        disk.disconnect_all(bus, 7)
    assert not bus.exists(BACK)


def test_two_who_take_the_same_disk_away_do_not_fail_each_other(bus: Bus) -> None:
    def ours() -> None:
        bus.write_many(disk.nodes(7, prepared()))
        disk.disconnect_all(bus, 7)
        assert not bus.exists("/local/domain/7")

    def theirs() -> None:
        bus.rm_many(["/local/domain/7", "/local/domain/0/backend/vbd/7"])

    assert interleave(bus, ours, theirs) > 5


def test_a_loop_device_that_is_another_guests_by_now_is_not_waited_for(
    bus: Bus, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number, and maybe the same file: a base image that many guests read."""
    monkeypatch.setattr(blockdev, "SYSFS", str(host))
    monkeypatch.setattr(disk, "DETACH_TIMEOUT", 0.01)
    behind, counted = host / "loop3/loop/backing_file", host / "loop3/diskseq"
    behind.parent.mkdir(parents=True)
    behind.write_text("/a\n")
    counted.write_text("17\n")
    said = {hotplug.PHYSICAL_DEVICE: "7:3", hotplug.SEQUENCE: "17"}
    both = [*disk.nodes(7, prepared()), *((f"{BACK}/{key}", said[key]) for key in said)]
    bus.write_many(both)
    with pytest.raises(DeviceError, match="/a is still held by loop3"):
        disk.disconnect_all(bus, 7)
    # Taken over before we begin: the guest had made its back end go.
    bus.write_many(both)
    counted.write_text("18\n")
    behind.write_text("/b\n")
    disk.disconnect_all(bus, 7)
    # And while we wait.
    behind.write_text("/a\n")
    counted.write_text("17\n")
    bus.write_many(both)
    close = backend.close

    def closed(*arguments: Any) -> None:
        close(*arguments)
        counted.write_text("19\n")

    monkeypatch.setattr(backend, "close", closed)
    disk.disconnect_all(bus, 7)
    assert not bus.exists(BACK)
