"""What a toolstack and xendevd agree on: who plugs a vif or a disk, and how one hears of it.

docs/xendevd.md has the order of events. In short: the toolstack writes the
backend's nodes with ``hotplug-status`` empty; netback holds back its state 4 until
the node says ``connected`` (hotplug_status_changed in
drivers/net/xen-netback/xenbus.c); xendevd plugs the interface and writes that, or
``error`` and beside it the cause.
"""

from noxs import lockfile
from xenctypes.errors import BusError, ChaosError, DeviceError

__all__ = ["BusError", "ChaosError", "DeviceError", "running", "script_for"]

STATUS = "hotplug-status"
ERROR_TEXT = "hotplug-error"
PENDING = ""
CONNECTED = "connected"
ERROR = "error"

BLOCK_SCRIPT = "block-xendevd"
"""The ``script`` of the disks that xendevd sets up, on every host."""
IDENTITY = "identity"
"""The node of a disk that says what its ``params`` led to when the toolstack looked
(noxs.blockdev.identity); xendevd takes nothing else for it."""
TYPE_FILE, TYPE_DEVICE = "file", "phy"
PHYSICAL_DEVICE = "physical-device"
SEQUENCE = "diskseq"
"""The node of a disk that tells its loop device from the next one with that number
(noxs.blockdev.sequence); missing where the kernel has no such number."""

LOCK = "/run/xendevd.lock"
"""xendevd holds an flock on this file for as long as it runs; the file itself stays."""

SCRIPTS = {
    "": "vif-xendevd",
    "vif-xendevd": "vif-xendevd",
    "vif-bridge": "vif-xendevd-bridge",
    "vif-openvswitch": "vif-xendevd-openvswitch",
}
"""A vif's script as configured, without its directory, and the one to write for xendevd."""


def script_for(script: str) -> str:
    """The ``script`` node of a vif that xendevd shall plug. Raises DeviceError.

    Other names than these leave the vif to libxl, which runs scripts; netback only
    wants the node to exist.
    """
    name = script.rpartition("/")[2]
    if name not in SCRIPTS:
        raise DeviceError(
            f"script {script!r}: xendevd runs no scripts",
            hint="vif-bridge and vif-openvswitch are built in",
        )
    return SCRIPTS[name]


def running(lock: str = LOCK) -> bool:
    """Whether xendevd runs on this host."""
    return lockfile.held(lock)
