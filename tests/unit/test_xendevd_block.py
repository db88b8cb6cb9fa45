"""Disks set up for blkback, with a real store and loop devices of paper."""

from __future__ import annotations

import os
from errno import EPERM
from typing import TYPE_CHECKING

import pytest
from loop_kernel import LoopKernel
from noxsd_process import Noxsd

from noxs import blockdev, hotplug
from noxs.bus import Bus
from xendevd.block import TAG, Disks
from xendevd.monitor import OFFLINE, ONLINE, VbdEvent, present_disks, translate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Noxsd(tmp_path_factory.mktemp("bus")).start()
    yield server.socket
    server.kill()


class Bench:
    """Disks, their bus, and images in a directory."""

    def __init__(self, bus: Bus, kernel: LoopKernel, directory: Path) -> None:
        self.bus = bus
        self.kernel = kernel
        self.directory = directory
        self.lines: list[str] = []
        self.disks = self.restarted()

    def restarted(self) -> Disks:
        self.disks = Disks(self.bus, self.log, str(self.directory / "sysfs"))
        return self.disks

    def log(self, text: str, *, level: int = 6) -> None:
        self.lines.append(text)

    def image(self, name: str = "disk", size: int = 1024) -> Path:
        path = self.directory / name
        path.write_bytes(bytes(size))
        return path

    def vbd(self, domid: int, target: Path | str, mode: str = "w", **more: str) -> VbdEvent:
        path = f"backend/vbd/{domid}/51712"
        nodes = {
            "script": hotplug.BLOCK_SCRIPT, "type": "file", "params": str(target), "mode": mode,
            "frontend-id": str(domid), hotplug.STATUS: hotplug.PENDING,
        }  # fmt: skip
        if os.path.exists(target):
            nodes[hotplug.IDENTITY] = blockdev.identity(os.stat(target))
        nodes |= more
        self.bus.write_many([(f"{path}/{key}", value) for key, value in nodes.items()])
        return VbdEvent(ONLINE, path)

    def verdict(self, event: VbdEvent) -> tuple[str | None, ...]:
        keys = hotplug.PHYSICAL_DEVICE, hotplug.STATUS, hotplug.ERROR_TEXT
        return tuple(self.bus.read_many(f"{event.path}/{key}" for key in keys))

    def plug(self, event: VbdEvent) -> tuple[str | None, ...]:
        self.disks.handle([event])
        return self.verdict(event)

    def refused(self, event: VbdEvent) -> str:
        device, status, text = self.plug(event)
        assert (device, status) == (None, hotplug.ERROR)
        assert text in self.lines[-1]  # type: ignore[operator]
        return str(text)


@pytest.fixture
def bench(store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    with Bus.connect(store) as bus:
        bus.rm("backend")
        yield Bench(bus, LoopKernel(monkeypatch), tmp_path)


CONNECTED = hotplug.CONNECTED


def test_a_file_gets_a_loop_device_for_as_long_as_the_disk_is_there(bench: Bench) -> None:
    event = bench.vbd(3, bench.image())
    assert bench.plug(event) == ("7:0", CONNECTED, None)
    assert bench.kernel.bound[0]["name"].rstrip(b"\0").decode() == TAG + event.path
    assert bench.plug(event) == ("7:0", CONNECTED, None)
    bench.disks.handle([VbdEvent(OFFLINE, event.path)])
    assert bench.kernel.bound == {}
    bench.disks.handle([VbdEvent(OFFLINE, event.path)])


def test_a_loop_device_can_be_told_from_the_next_with_its_number(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockdev, "SYSFS", str(bench.directory))
    event = bench.vbd(3, bench.image())
    assert bench.plug(event) == ("7:0", CONNECTED, None)
    assert bench.bus.get(f"{event.path}/{hotplug.SEQUENCE}") is None
    bench.bus.rm(event.path)
    (bench.directory / "loop0").mkdir()
    (bench.directory / "loop0/diskseq").write_text("17\n")
    assert bench.plug(bench.vbd(3, bench.image())) == ("7:0", CONNECTED, None)
    assert bench.bus.get(f"{event.path}/{hotplug.SEQUENCE}") == "17"


def test_a_disk_that_came_and_went_and_came_has_one_loop_device(bench: Bench) -> None:
    event = bench.vbd(3, bench.image())
    bench.plug(event)
    bench.bus.rm(event.path)
    assert bench.plug(bench.vbd(3, bench.image("other"))) == ("7:0", CONNECTED, None)
    assert list(bench.kernel.bound) == [0]


def test_what_is_not_xendevds_is_left_alone(bench: Bench) -> None:
    event = bench.vbd(3, bench.image(), script="/etc/xen/scripts/block")
    assert bench.plug(event) == (None, "", None)


def test_a_disk_that_goes_meanwhile_leaves_nothing(bench: Bench) -> None:
    event = bench.vbd(3, bench.image())
    bench.bus.rm(f"{event.path}/frontend-id")
    assert bench.plug(event) == (None, "", None)
    assert bench.kernel.bound == {}


def test_failures_name_their_cause(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    image = bench.image()
    assert "No such file" in bench.refused(bench.vbd(3, image.parent / "missing"))
    assert "no regular file" in bench.refused(bench.vbd(3, image.parent, "r"))
    assert "Is a directory" in bench.refused(bench.vbd(3, image.parent))
    assert "no block device" in bench.refused(bench.vbd(3, image, type="phy"))
    assert "smaller than a sector" in bench.refused(bench.vbd(3, bench.image("small", 511)))
    assert "neither r nor w" in bench.refused(bench.vbd(3, image, "rw"))
    assert "type 'qdisk'" in bench.refused(bench.vbd(3, image, type="qdisk"))
    assert "no absolute path" in bench.refused(bench.vbd(3, "disk"))
    other = blockdev.identity(bench.image("other").stat())
    assert "another file" in bench.refused(bench.vbd(3, image, identity=other))
    os.mkfifo(image.parent / "fifo")
    assert "no regular file" in bench.refused(bench.vbd(3, image.parent / "fifo", "r"))
    monkeypatch.setattr(blockdev, "_open", os.open)
    monkeypatch.setattr(blockdev, "_close", os.close)
    monkeypatch.setattr(blockdev, "CONTROL", "/nonexistent")
    assert "modprobe loop" in bench.refused(bench.vbd(3, image))
    assert bench.kernel.bound == {}


def test_a_disk_that_is_written_is_not_shared(bench: Bench) -> None:
    image = bench.image()
    link = image.parent / "link"
    os.link(image, link)
    writer = bench.vbd(3, image)
    bench.plug(writer)
    for mode in ("w", "r"):
        assert "is a disk of domain 3" in bench.refused(bench.vbd(4, link, mode))
    bench.disks.handle([VbdEvent(OFFLINE, writer.path)])
    assert bench.plug(bench.vbd(5, link, "r")) == ("7:0", CONNECTED, None)
    assert bench.plug(bench.vbd(6, image, "r")) == ("7:1", CONNECTED, None)
    assert "is a disk of domain 5" in bench.refused(bench.vbd(7, image))


def test_what_dom0_has_mounted_is_not_given_away(bench: Bench) -> None:
    image = bench.image()
    with image.open("rb") as file:
        blockdev.attach(file.fileno(), "", writable=True)
    assert "in use by /dev/loop0" in bench.refused(bench.vbd(3, image, "r"))


def test_disks_of_another_toolstack_count(bench: Bench) -> None:
    image = bench.image()
    with image.open("rb") as file:
        number = blockdev.attach(file.fileno(), "", writable=False)
    theirs = bench.directory / "sysfs/vbd-9-51712"
    theirs.mkdir(parents=True)
    (theirs / "physical_device").write_text(f"7:{number:x}\n")
    (theirs / "mode").write_text("r\n")
    assert "is a disk of domain 9" in bench.refused(bench.vbd(3, image))
    assert bench.plug(bench.vbd(4, image, "r"))[1] == CONNECTED


def test_a_successor_knows_whose_loop_devices_there_are(bench: Bench) -> None:
    kept, gone = bench.vbd(3, bench.image("a")), bench.vbd(4, bench.image("b"))
    bench.disks.handle([kept, gone])
    with bench.image("c").open("rb") as file:
        blockdev.attach(file.fileno(), "somebody's", writable=True)
    # Killed after it bound a device, before it wrote so.
    half = bench.vbd(5, bench.image("d"))
    with (bench.directory / "d").open("rb") as file:
        blockdev.attach(file.fileno(), TAG + half.path, writable=True)
    bench.bus.rm(gone.path)
    bench.restarted().catch_up([kept, half])
    assert {loop: bench.kernel.bound[loop]["name"].rstrip(b"\0") for loop in (0, 2)} == {
        0: (TAG + kept.path).encode(), 2: b"somebody's",
    }  # fmt: skip
    assert bench.verdict(half)[1] == CONNECTED
    assert len(bench.kernel.bound) == 3
    assert "is a disk of domain 3" in bench.refused(bench.vbd(6, bench.directory / "a", "r"))
    bench.disks.handle([VbdEvent(OFFLINE, event.path) for event in (kept, half)])
    assert list(bench.kernel.bound) == [2]


def test_a_loop_device_that_cannot_be_looked_at_stops_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bench.vbd(3, bench.image())
    bench.plug(first)

    def forbidden(_number: int) -> None:
        raise PermissionError(EPERM, "Operation not permitted")

    monkeypatch.setattr(blockdev, "look", forbidden)
    bench.disks.handle([VbdEvent(OFFLINE, first.path)])
    bench.disks.catch_up([])
    assert ["cannot be looked at" in line for line in bench.lines] == [True, True]
    # Whether somebody has the file cannot be told then: nobody gets it.
    assert "Operation not permitted" in bench.refused(bench.vbd(4, bench.image()))


def test_events_of_disks() -> None:
    about = {"XENBUS_TYPE": "vbd", "XENBUS_PATH": "backend/vbd/3/51712"}
    assert translate("add", about) == VbdEvent(ONLINE, "backend/vbd/3/51712")
    assert translate("remove", about) == VbdEvent(OFFLINE, "backend/vbd/3/51712")
    assert translate("bind", about) is None
    assert translate("add", {**about, "XENBUS_PATH": ""}) is None


def test_disks_that_exist(tmp_path: Path) -> None:
    for name in ("vbd-3-51712", "vbd-4-51712", "vif-3-0"):
        (tmp_path / name).mkdir()
    (tmp_path / "vbd-3-51712/nodename").write_text("backend/vbd/3/51712\n")
    assert present_disks(str(tmp_path)) == [VbdEvent(ONLINE, "backend/vbd/3/51712")]
    assert present_disks(str(tmp_path / "nowhere")) == []
