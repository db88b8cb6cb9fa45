"""The Debian releases that a lab can run, and the recipe of their Dom0 images.

The recipe is data: its hash names the image in the cache, so that any change here builds
a new image and nothing else does.
"""

import hashlib
import json
from dataclasses import dataclass

from lab.errors import UsageError


@dataclass(frozen=True)
class Release:
    """One Debian release: ``number`` as in "Debian 12", its suite, its Xen (major.minor)."""

    number: str
    suite: str
    xen: str

    @property
    def packages(self) -> tuple[str, ...]:
        """Debian packages that mmdebstrap installs, dependencies apart."""
        return (
            f"xen-utils-{self.xen}",
            f"xen-hypervisor-{self.xen}-amd64",
            f"libxenmisc{self.xen}",
            *PACKAGES,
        )

    def digest(self, assembly: str) -> str:
        """First 12 hex digits of the SHA-256 over everything that shapes the image.

        ``assembly`` is the text of the scripts that put it together.
        """
        recipe = [
            FORMAT,
            assembly,
            self.suite,
            self.xen,
            self.packages,
            PATH_EXCLUDES,
            MODULE_EXCLUDES,
            INITRAMFS_MODULES,
            DISK_BYTES,
            FILES,
        ]
        return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


RELEASES = {
    "12": Release("12", "bookworm", "4.17"),
    "13": Release("13", "trixie", "4.20"),
}
DEFAULT_RELEASE = "12"

FORMAT = 1
"""Raised when the way an image is assembled changes, rather than what is in it."""

PACKAGES = (
    "bridge-utils",
    "busybox-static",
    "crun",
    "dbus",
    "e2fsprogs",
    "ethtool",
    "iperf3",
    "iproute2",
    "iputils-arping",
    "iputils-ping",
    "kmod",
    "linux-image-amd64",
    "linux-perf",
    "lsof",
    "netcat-openbsd",
    "openvswitch-switch",
    "procps",
    "psmisc",
    "python3",
    "python3-hypothesis",
    "python3-installer",
    "python3-msgpack",
    "python3-pyroute2",
    "python3-pytest",
    "python3-pyudev",
    "python3-rich",
    "runc",
    "socat",
    "strace",
    "systemd",
    "systemd-sysv",
    "tcpdump",
    "trace-cmd",
    "udev",
    "xenstore-utils",
    "xz-utils",
)

PATH_EXCLUDES = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/lintian/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/boot/*.efi",
)
"""dpkg path-exclude globs (a star matches slashes too, see dpkg(1))."""

MODULE_EXCLUDES = (
    "drivers/ata",
    "drivers/bluetooth",
    "drivers/comedi",
    "drivers/gpu",
    "drivers/hid",
    "drivers/hwmon",
    "drivers/iio",
    "drivers/infiniband",
    "drivers/input",
    "drivers/isdn",
    "drivers/media",
    "drivers/mmc",
    "drivers/mtd",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/platform",
    "drivers/scsi",
    "drivers/staging",
    "drivers/target",
    "drivers/thunderbolt",
    "drivers/usb",
    "fs/afs",
    "fs/btrfs",
    "fs/ceph",
    "fs/f2fs",
    "fs/gfs2",
    "fs/nfs",
    "fs/nfsd",
    "fs/ocfs2",
    "fs/smb",
    "net/bluetooth",
    "net/wireless",
    "sound",
)
"""Module folders below /lib/modules/*/kernel that no Dom0 in QEMU has a use for."""

INITRAMFS_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
"""Modules that find and mount the root file system; what they need is looked up."""

DISK_BYTES = 8 << 30
"""Size of the root file system; the file is sparse."""

FILES = {
    "/etc/hostname": "dom0\n",
    "/etc/hosts": "127.0.0.1 localhost dom0\n::1 localhost\n",
    "/etc/resolv.conf": "",
    "/etc/fstab": "",
}
"""Files written into the image."""


def release(number: str) -> Release:
    """Return the release called ``number``; raise UsageError for any other."""
    try:
        return RELEASES[number]
    except KeyError:
        raise UsageError(
            f"no lab for Debian {number}", hint=f"there are {' and '.join(RELEASES)}"
        ) from None
