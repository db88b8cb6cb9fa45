"""Disks of noxs guests through the command: what is written arrives, and nothing stays behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from command import chaos
from daemons import ensure_bus, ensure_xendevd

from chaos.host import Host
from chaos.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterator

DISK = "examples/disk.cfg"
BACKENDS = "/local/domain/0/backend/vbd"


def loops() -> dict[str, str]:
    """Files behind loop devices, by the devices' names."""
    found = {}
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        found[path.parts[3]] = path.read_text().strip()
    return found


def check_written(image: Path, sectors: int) -> None:
    data = image.read_bytes()
    for number in range(sectors):
        text = f"sector {number} of disk 51712\n".encode()
        assert data[512 * number :].startswith(text)
        assert data[512 * number + 511] == (number * 31 + 511) & 255
    assert not any(data[512 * sectors :])


@pytest.fixture
def image() -> Iterator[Path]:
    """An image where direct I/O works, and a check that afterwards nobody has anything of it."""
    ensure_bus()
    ensure_xendevd()
    Registry().prepare()
    with TemporaryDirectory(dir="/var/tmp") as directory, Host() as host:
        made = Path(directory) / "image"
        made.write_bytes(bytes(1 << 20))
        before = loops()
        try:
            yield made
        finally:
            chaos("destroy", "--all")
        assert loops() == before
        assert not host.bus.exists(BACKENDS) or not host.bus.directory(BACKENDS)
        assert not [d for d in os.listdir("/sys/bus/xen-backend/devices") if d.startswith("vbd-")]
        assert not os.listdir("/run/chaos/domains")


def test_what_a_guest_writes_arrives(image: Path) -> None:
    """The guest says ready when it has read back what it wrote."""
    disk = f"disk=['{image},raw,xvda,rw']"
    made = json.loads(chaos("create", DISK, "name='writer'", disk, "--json").stdout)
    assert made["profile"]["ready_ms"]
    check_written(image, 64)
    chaos("destroy", "writer")
    assert str(image) not in loops().values()
