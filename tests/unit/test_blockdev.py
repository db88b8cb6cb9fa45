"""Loop devices, and which disk is which."""

from __future__ import annotations

import ctypes
import os
from typing import TYPE_CHECKING

import pytest
from loop_kernel import LoopKernel

from noxs import blockdev

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> LoopKernel:
    return LoopKernel(monkeypatch)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    made = tmp_path / "disk"
    made.write_bytes(bytes(1024))
    return made


class Info64(ctypes.Structure):
    """As in linux/loop.h."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("device", "inode", "rdevice", "offset", "limit")),
        *((name, ctypes.c_uint32) for name in ("number", "type", "key_size", "flags")),
        ("file_name", ctypes.c_uint8 * 64),
        ("crypt_name", ctypes.c_uint8 * 64),
        ("key", ctypes.c_uint8 * 32),
        ("init", ctypes.c_uint64 * 2),
    )


def test_the_layouts_are_the_compilers() -> None:
    assert blockdev.INFO.size == ctypes.sizeof(Info64) == 232
    assert blockdev.CONFIG.size == 8 + 232 + 64


@pytest.mark.parametrize("writable", [True, False])
def test_a_file_becomes_a_device_and_none(kernel: LoopKernel, disk: Path, writable: bool) -> None:
    with disk.open("rb") as file:
        number = blockdev.attach(file.fileno(), "tag", writable=writable)
    loop = blockdev.look(number)
    assert loop is not None
    assert (loop.tag, loop.writable, loop.path) == ("tag", writable, "/dev/loop0")
    assert loop.identity == blockdev.identity(disk.stat())
    assert kernel.bound[number]["flags"] & blockdev.LO_FLAGS_DIRECT_IO
    assert not kernel.bound[number]["flags"] & blockdev.LO_FLAGS_AUTOCLEAR
    blockdev.detach(number)
    assert blockdev.look(number) is None
    blockdev.detach(number)
    assert not kernel.nodes


def test_another_process_may_be_quicker(kernel: LoopKernel, disk: Path) -> None:
    kernel.stolen = [0, 1]
    with disk.open("rb") as file:
        assert blockdev.attach(file.fileno(), "", writable=False) == 2


def test_one_file_has_one_identity(kernel: LoopKernel, disk: Path, tmp_path: Path) -> None:
    os.link(disk, tmp_path / "link")
    (tmp_path / "symlink").symlink_to("link")
    wanted = blockdev.identity(disk.stat())
    assert blockdev.identity((tmp_path / "symlink").stat()) == wanted
    with disk.open("rb") as file:
        number = blockdev.attach(file.fileno(), "", writable=False)
    assert blockdev.device_identity(blockdev.MAJOR, number) == wanted
    assert blockdev.blocks(disk.stat()) == wanted
    (tmp_path / "other").write_bytes(bytes(1024))
    assert blockdev.identity((tmp_path / "other").stat()) != wanted
    assert blockdev.device_identity(8, number) == f"device:8:{number:x}"
    assert blockdev.device_identity(blockdev.MAJOR, 77) == "device:7:4d"


def test_a_loop_device_of_a_block_device_is_that_device(kernel: LoopKernel) -> None:
    # os.stat_result: mode, inode, device, ... and st_rdev among the rest, by name.
    class Device:
        st_dev, st_ino, st_mode, st_rdev = 5, 17, 0o060600, os.makedev(8, 3)

    kernel.bound[4] = {"status": Device(), "flags": 0, "name": b""}
    assert blockdev.device_identity(blockdev.MAJOR, 4) == "device:8:3"


def test_bound_devices_are_found(tmp_path: Path) -> None:
    for name in ("loop0", "loop12", "sda"):
        (tmp_path / name).mkdir()
    (tmp_path / "loop12/loop").mkdir()
    (tmp_path / "loop12/loop/backing_file").touch()
    assert blockdev.bound(str(tmp_path)) == [12]
