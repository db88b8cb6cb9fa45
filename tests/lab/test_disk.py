"""Disks of noxs guests through the command: what is written arrives, and nothing stays behind."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from chaosd import GUESTS, running
from command import chaos
from daemons import ensure_bus, ensure_xendevd, loops
from test_create import Footprint
from waiting import wait_for

from chaos.client import Chaos
from chaos.host import Host
from chaos.registry import Registry
from noxs import blockdev

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK = "examples/disk.cfg"
BACKENDS = "/local/domain/0/backend/vbd"


def create(name: str, *disks: str, more: tuple[str, ...] = ()) -> dict[str, object]:
    """Create the demonstration and wait until it has checked its disks."""
    made = json.loads(chaos("create", DISK, *wanted(name, *disks), *more, "--json").stdout)
    assert made["profile"]["ready_ms"], chaos("logs", name).stdout
    return dict(made)


def wanted(name: str, *disks: str) -> tuple[str, ...]:
    return f"name='{name}'", f"disk=[{', '.join(map(repr, disks))}]"


def refused(name: str, *disks: str) -> str:
    done = chaos("create", DISK, *wanted(name, *disks), check=False)
    assert done.returncode == 1, done.stdout
    return done.stderr


def check_written(image: Path, sectors: int) -> None:
    data = image.read_bytes()
    for number in range(sectors):
        text = f"sector {number} of disk 51712\n".encode()
        assert data[512 * number :].startswith(text)
        assert data[512 * number + 511] == (number * 31 + 511) & 255
    assert not any(data[512 * sectors :])


@pytest.fixture(scope="module")
def warm() -> None:
    """What the hypervisor keeps for Dom0 once it has mapped a ring is no leak."""
    ensure_bus()
    ensure_xendevd()
    Registry().prepare()
    with TemporaryDirectory(dir="/var/tmp") as directory:
        made = Path(directory) / "image"
        made.write_bytes(bytes(1 << 20))
        create("warm", f"{made},raw,xvda,rw")
        chaos("destroy", "warm")


@pytest.fixture
def image(warm: None) -> Iterator[Path]:
    """An image where direct I/O works, and a check that afterwards nobody has anything of it."""
    with TemporaryDirectory(dir="/var/tmp") as directory, Host() as host:
        made = Path(directory) / "image"
        made.write_bytes(bytes(1 << 20))
        _ = host.evtchn, host.memory, host.bus
        measured = Footprint(host)
        before = loops()
        try:
            yield made
        finally:
            chaos("destroy", "--all")
        assert loops() == before
        assert not host.bus.exists(BACKENDS) or not host.bus.directory(BACKENDS)
        assert not [d for d in os.listdir("/sys/bus/xen-backend/devices") if d.startswith("vbd-")]
        measured.settled()


@pytest.mark.anyhost
def test_what_a_guest_writes_arrives_and_is_its_own(image: Path) -> None:
    """As PV; then two PVH guests that only read share it; then one is destroyed as it writes."""
    link = image.parent / "link"
    link.hardlink_to(image)
    create("writer", f"{image},raw,xvda,rw")
    check_written(image, 64)
    (device,) = (name for name, file in loops().items() if file == str(image))
    for target in (link, f"/dev/{device}"):
        for access in ("rw", "ro"):
            assert 'is a disk of "writer" already' in refused(
                "other", f"{target},raw,xvda,{access}"
            )
    other = image.parent / "other"
    other.write_bytes(bytes(4096))
    assert "this domain" in refused("other", f"{other},raw,xvda,rw", f"{other},raw,xvdb,ro")
    held = image.parent / "held"
    held.write_bytes(bytes(4096))
    with held.open("r+b") as file:
        number = blockdev.attach(file.fileno(), "", writable=True)
    # What only xendevd finds out, when the first disk is set up: that one is taken back.
    assert "in use by" in refused("other", f"{other},raw,xvda,rw", f"{held},raw,xvdb,ro")
    blockdev.detach(number)
    assert str(other) not in loops().values()
    chaos("destroy", "writer")
    assert str(image) not in loops().values()
    readers = "type='pvh'", "cmdline='keep'"
    create("one", f"{image},raw,xvda,ro", more=readers)
    create("two", f"{link},raw,xvda,ro", more=readers)
    assert "already" in refused("other", f"{image},raw,xvda,rw")
    chaos("destroy", "one", "two")
    create("busy", f"{image},raw,xvda,rw", more=("cmdline='busy sectors=2048'",))
    chaos("destroy", "busy")
    create("again", f"{image},raw,xvda,rw", more=("cmdline='sectors=2048'",))
    check_written(image, 2048)


@pytest.mark.anyhost
def test_what_cannot_be_a_disk_is_named_and_leaves_nothing(image: Path) -> None:
    """Found out by the toolstack; the last one by xendevd, which opens it."""
    folder = image.parent
    small, locked, frozen = folder / "small", folder / "locked", folder / "frozen"
    small.write_bytes(bytes(511))
    locked.write_bytes(bytes(4096))
    locked.chmod(0o444)
    frozen.mkdir()
    with locked.open("rb") as file:
        number = blockdev.attach(file.fileno(), "", writable=False)
    bind = ["mount", "--bind", str(folder), str(frozen)]
    subprocess.run(bind, check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", str(frozen)], check=True)
    try:
        for target, cause in (
            (folder / "missing", "No such file or directory"),
            (folder, "is a directory"),
            (small, "has 511 bytes, less than a sector"),
            (locked, "is read-only"),
            (f"/dev/loop{number}", "is read-only"),
            (frozen / "image", "is read-only"),
        ):
            said = refused("disk", f"{target},raw,xvda,rw")
            assert str(target) in said
            assert cause in said
            assert said.count("\n") == 1, said
    finally:
        subprocess.run(["umount", str(frozen)], check=True)
        blockdev.detach(number)


def test_the_daemon_gives_roots_guests_disks_and_restarts_them(image: Path) -> None:
    with running("[pool]\nadaptive = false\n") as daemon, Chaos() as client:
        settings = [*wanted("disk", f"{image},raw,xvda,rw"), f"kernel='{GUESTS}/disk.elf'"]
        made = client.call("create", path=f"/src/{DISK}", overrides=settings, wait_ready=60)
        check_written(image, 64)
        said = client.call("logs", domain="disk").replace(b"\r", b"")
        assert b"wrote and read 64 sectors, 0 wrong, 0 requests failed\n1 disks are sound" in said
        daemon.kill()
        daemon.start()
        with Chaos() as again:
            again.call("reboot", domains=["disk"])
            wait_for(
                lambda: any(
                    one["name"] == "disk" and one["domid"] != made["domid"]
                    for one in again.call("list")
                ),
                "it is not restarted",
            )
        assert str(image) in loops().values()
