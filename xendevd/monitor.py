"""Which vifs and disks come and go: the kernel's uevents, and sysfs for what was missed.

netback sends ``online`` from its probe, once vifN.M exists (backend_create_xenvif in
drivers/net/xen-netback/xenbus.c), and ``offline`` right before it frees the interface
(netback_remove); both carry XENBUS_PATH and vif. ``add``, ``bind`` and ``unbind`` say
nothing more; ``remove`` comes last and stands in for an ``offline`` that got lost.

blkback sends nothing of its own: a disk's nodes are there at ``add``, and blkback has closed the
device, or will as soon as its last request is done, at ``remove``.

The events are taken from the kernel itself, not from udevd: no daemon needs to run, nothing
is forked per event, and a vif is plugged without waiting for rules to be matched.
"""

import os
from errno import ENOBUFS
from pathlib import Path
from typing import NamedTuple

import pyudev

SUBSYSTEM = "xen-backend"
SYSFS = "/sys/bus/xen-backend/devices"
RECEIVE_BUFFER = 64 << 20
"""Bytes. 1,000 vifs make some 10,000 events of all subsystems, each of up to 2 KB with its
overhead, and the kernel queues them all here before libudev picks ours."""

ONLINE, OFFLINE = "online", "offline"


class VifEvent(NamedTuple):
    """``action`` is ONLINE or OFFLINE, ``path`` the backend node, ``vif`` the interface or ""."""

    action: str
    path: str
    vif: str


class VbdEvent(NamedTuple):
    """``action`` is ONLINE or OFFLINE, ``path`` the backend node of the disk."""

    action: str
    path: str


class Monitor:
    """The stream of events. ``fileno`` is readable when ``read`` has something."""

    def __init__(self, subsystem: str = SUBSYSTEM) -> None:
        self._monitor = pyudev.Monitor.from_netlink(pyudev.Context(), source="kernel")
        self._monitor.filter_by(subsystem)
        self._monitor.set_receive_buffer_size(RECEIVE_BUFFER)
        self._monitor.start()

    def fileno(self) -> int:
        """The netlink socket."""
        return int(self._monitor.fileno())

    def read(self) -> tuple[list[VifEvent | VbdEvent], bool]:
        """All events that wait, and whether some were lost (then sysfs is the truth)."""
        events: list[VifEvent | VbdEvent] = []
        lost = False
        while True:
            try:
                device = self._monitor.poll(timeout=0)
            except OSError as error:
                if error.errno != ENOBUFS:
                    raise
                lost = True
                continue
            if device is None:
                return events, lost
            event = translate(device.action or "", dict(device.properties))
            if event is not None:
                events.append(event)


def translate(action: str, properties: dict[str, str]) -> VifEvent | VbdEvent | None:
    """The event that a uevent means, if it is about a vif or a disk."""
    path, kind = properties.get("XENBUS_PATH", ""), properties.get("XENBUS_TYPE")
    if kind == "vbd" and path:
        known = {"add": ONLINE, "remove": OFFLINE}
        return VbdEvent(known[action], path) if action in known else None
    if kind != "vif" or not path:
        return None
    if action == "remove":
        return VifEvent(OFFLINE, path, "")
    if action not in {ONLINE, OFFLINE}:
        return None
    return VifEvent(action, path, properties.get("vif", ""))


def present(sysfs: str = SYSFS) -> list[VifEvent]:
    """The vifs that exist now, each as if it had just come online."""
    events = []
    try:
        names = [name for name in os.listdir(sysfs) if name.startswith("vif-")]
    except FileNotFoundError:
        return []  # netback is not loaded yet
    for name in sorted(names):
        try:
            path = Path(sysfs, name, "nodename").read_text().strip()
            interfaces = os.listdir(f"{sysfs}/{name}/net")
        except OSError:
            continue  # still being probed: its event is to come; or going away
        events += [VifEvent(ONLINE, path, interface) for interface in interfaces[:1]]
    return events


def present_disks(sysfs: str = SYSFS) -> list[VbdEvent]:
    """The disks that exist now, each as if it had just been added."""
    events = []
    try:
        names = [name for name in os.listdir(sysfs) if name.startswith("vbd-")]
    except FileNotFoundError:
        return []  # no Xen
    for name in sorted(names):
        try:
            path = Path(sysfs, name, "nodename").read_text().strip()
        except OSError:
            continue  # going away
        events.append(VbdEvent(ONLINE, path))
    return events
