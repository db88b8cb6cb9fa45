"""One record per Xen release: what of the unstable interface differs.

Stable libraries need none of this. ``libxenctrl`` and ``libxenguest`` carry
the release in their name, and the structures they take change with it.
"""

from __future__ import annotations

from xenctypes import structs
from xenctypes.errors import NoXen, UnknownRelease
from xenctypes.public import DOMID_ANY
from xenctypes.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ctypes import Structure

SYSFS = "/sys/hypervisor"


class Release(Record):
    """What differs from one release to the next.

    ``version``            (major, minor).
    ``domctl``             XEN_DOMCTL_INTERFACE_VERSION (domctl.h).
    ``createdomain``       the structure that xc_domain_create takes.
    ``any_domid``          the domid that asks xc_domain_create to choose one:
                           0, and DOMID_ANY since 4.22 (xen.git 23e2479ff9).
    ``console_connected``  xencons_interface has its ``connection`` byte (4.21).
    ``dom_memflags``       xc_dom_image has ``memflags`` and xc_domain_restore
                           takes them as a last argument (4.22).
    """

    __slots__ = (
        "any_domid",
        "console_connected",
        "createdomain",
        "dom_memflags",
        "domctl",
        "version",
    )
    version: tuple[int, int]
    domctl: int
    createdomain: type[Structure]
    any_domid: int
    console_connected: bool
    dom_memflags: bool

    def __str__(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"


def _release(minor: int, domctl: int) -> Release:
    return Release(
        version=(4, minor),
        domctl=domctl,
        createdomain=(
            structs.xen_domctl_createdomain_4_17
            if minor < 19
            else structs.xen_domctl_createdomain_4_19
        ),
        any_domid=0 if minor < 22 else DOMID_ANY,
        console_connected=minor >= 21,
        dom_memflags=minor >= 22,
    )


RELEASES: dict[tuple[int, int], Release] = {
    release.version: release
    for release in (
        _release(17, 0x15),
        _release(18, 0x16),
        _release(19, 0x17),
        _release(20, 0x17),
        _release(21, 0x17),
        _release(22, 0x18),
    )
}


def running(sysfs: str = SYSFS) -> Release:
    """The record of the hypervisor that this machine runs on.

    ``sysfs`` is the kernel's directory about it (Documentation/ABI/stable/
    sysfs-hypervisor-xen). Raises NoXen or UnknownRelease.
    """
    version = running_version(sysfs)
    try:
        return RELEASES[version]
    except KeyError:
        known = ", ".join(str(release) for release in RELEASES.values())
        raise UnknownRelease(
            f"Xen {version[0]}.{version[1]} is not a release that chaos knows",
            hint=f"known are {known}",
        ) from None


def running_version(sysfs: str = SYSFS) -> tuple[int, int]:
    """(major, minor) of the running hypervisor. Raises NoXen."""
    kind = _read(f"{sysfs}/type")
    if kind != "xen":
        raise NoXen(
            f"the hypervisor below this machine is {kind!r:.40}, not Xen", hint="boot Xen first"
        )
    major, minor = _read(f"{sysfs}/version/major"), _read(f"{sysfs}/version/minor")
    if not (major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()):
        raise NoXen(
            f"{sysfs}/version does not name a Xen release: {major!r:.20}, {minor!r:.20}",
            hint="the kernel's CONFIG_XEN_SYS_HYPERVISOR provides it",
        )
    return int(major), int(minor)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read(64).strip()
    except OSError as error:
        raise NoXen(
            f"this machine does not run on Xen: {path}: {error.strerror}",
            hint="boot Xen first, or try scripts/lab for a Xen host inside QEMU",
        ) from None
