"""A stock Linux guest: Debian's kernel, unpacked once, a ramdisk with busybox and modules."""

from __future__ import annotations

import lzma
import os
import subprocess
from pathlib import Path

KERNEL = Path(f"/boot/vmlinuz-{os.uname().release}")
DRIVERS = Path("/lib/modules") / os.uname().release / "kernel/drivers"
NET, BLOCK = "net/xen-netfront.ko", "block/xen-blkfront.ko"
EXT4 = tuple(
    str(path)
    for path in (
        Path("..") / name
        for name in (
            "crypto/crc32c_generic.ko", "lib/crc16.ko", "lib/libcrc32c.ko", "fs/mbcache.ko",
            "fs/jbd2/jbd2.ko", "fs/ext4/ext4.ko",
        )
    )
    if (DRIVERS / path).exists() or (DRIVERS / path).with_suffix(".ko.xz").exists()
)  # fmt: skip
"""What ext4 takes; which of it is built in differs between releases. In no order: see INIT."""
XZ = b"\xfd7zXZ\0"


def unpacked(directory: Path) -> Path:
    """The kernel, unpacked once instead of for each guest: ten seconds each time, in the lab."""
    packed = KERNEL.read_bytes()
    start = packed.find(XZ)
    if start < 0:
        return KERNEL
    kernel = directory / "vmlinux"
    kernel.write_bytes(lzma.LZMADecompressor().decompress(packed[start:]))
    return kernel


def initramfs(directory: Path, init: str, *modules: str) -> Path:
    """A ramdisk with busybox, an /init, and kernel modules at its root."""
    root = directory / "root"
    for name in ("bin", "sbin", "proc", "sys", "dev"):
        (root / name).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    for verb in ("poweroff", "reboot"):
        (root / "sbin" / verb).write_text(f"#!/bin/busybox sh\n/bin/busybox {verb} -f\n")
    (root / "init").write_text(init)
    for name in ("bin/busybox", "sbin/poweroff", "sbin/reboot", "init"):
        (root / name).chmod(0o755)
    for name in modules:
        path = DRIVERS / name
        packed = path.with_suffix(".ko.xz")
        data = path.read_bytes() if path.exists() else lzma.decompress(packed.read_bytes())
        (root / path.name).write_bytes(data)
    listing = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*"))) + "\n"
    made = directory / "initramfs"
    with made.open("wb") as out:
        subprocess.run(
            ["/bin/busybox", "cpio", "-o", "-H", "newc"],
            input=listing.encode(),
            stdout=out,
            cwd=root,
            check=True,
        )
    return made
