"""Disks set up for blkback: what Xen's block script does, and without one.

::

    uevent add --> nodes --> file: a loop device   --+--> physical-device, hotplug-status
                             device: its numbers   --+      (or hotplug-error and why)
    uevent remove --> the loop device is detached

A loop device's tag is the path of its backend: whoever starts after a kill knows which of them
are whose, and detaches those whose backend does not have them any more.
"""

from __future__ import annotations

import os
import stat
from errno import EACCES, EBUSY, EINVAL, EPERM, EROFS, ETXTBSY
from typing import TYPE_CHECKING, NamedTuple

from noxs import blockdev
from noxs.hotplug import (
    BLOCK_SCRIPT,
    CONNECTED,
    ERROR,
    ERROR_TEXT,
    IDENTITY,
    PHYSICAL_DEVICE,
    SEQUENCE,
    STATUS,
    TYPE_DEVICE,
    TYPE_FILE,
    DeviceError,
)
from xendevd.monitor import ONLINE, SYSFS, VbdEvent
from xendevd.plan import error_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from noxs.bus import Bus, Transaction
    from xendevd.plugger import Log

KEYS = ("script", "type", "params", "mode", IDENTITY, PHYSICAL_DEVICE, STATUS)
TAG = "xendevd:"
SECTOR = 512


class DiskPlan(NamedTuple):
    """How to set up one disk: the ``target`` is a path, ``identity`` what it must lead to."""

    path: str
    target: str
    file: bool
    writable: bool
    identity: str


class Given(NamedTuple):
    """What a disk was given (``identity`` is of its blocks); its loop device's number, or None."""

    identity: str
    writable: bool
    loop: int | None = None


def parse(path: str, nodes: Mapping[str, str]) -> DiskPlan:
    """Read a backend's nodes. DeviceError says which is wrong."""
    kind, target, mode = (nodes.get(key, "") for key in ("type", "params", "mode"))
    if kind not in {TYPE_FILE, TYPE_DEVICE}:
        raise DeviceError(f"type {kind!r}: only {TYPE_FILE} and {TYPE_DEVICE} are served")
    if not target.startswith("/") or "\0" in target:
        raise DeviceError(f"params {target!r} is no absolute path")
    if mode not in {"r", "w"}:
        raise DeviceError(f"mode {mode!r} is neither r nor w")
    return DiskPlan(path, target, kind == TYPE_FILE, mode == "w", nodes.get(IDENTITY, ""))


class Disks:
    """Sets disks up and takes them down. Whatever fails for one disk is that disk's verdict."""

    def __init__(self, bus: Bus, log: Log, sysfs: str = SYSFS) -> None:
        self.bus = bus
        self.log = log
        self.sysfs = sysfs
        self.given: dict[str, Given] = {}

    def handle(self, events: Iterable[VbdEvent]) -> None:
        """Bring the disks to where their newest events say. Raises BusError if the bus is lost."""
        for event in {event.path: event for event in events}.values():
            if event.action == ONLINE:
                self._plug(event.path)
            else:
                self._unplug(event.path)

    def catch_up(self, present: Iterable[VbdEvent]) -> None:
        """Take over what a predecessor did, detach what it left, set up what it missed."""
        paths = [event.path for event in present]
        nodes = dict(zip(paths, map(self._nodes, paths), strict=True))
        self.given = {
            path: given for path in paths if (given := self._taken_over(nodes[path])) is not None
        }
        for number in blockdev.bound():
            loop = self._look(number)
            if loop is None or not loop.tag.startswith(TAG):
                continue
            path = loop.tag.removeprefix(TAG)
            if nodes.get(path, {}).get(PHYSICAL_DEVICE) != _device(blockdev.MAJOR, number):
                self._detach(number, path)
            elif path in self.given:
                self.given[path] = self.given[path]._replace(loop=number)
        for path in paths:
            self._plug(path)

    def _taken_over(self, nodes: Mapping[str, str]) -> Given | None:
        try:
            numbers = [int(part, 16) for part in nodes.get(PHYSICAL_DEVICE, "").split(":")]
            if _script(nodes) != BLOCK_SCRIPT or len(numbers) != 2:
                return None
            return Given(blockdev.device_identity(*numbers), nodes.get("mode") == "w")
        except (ValueError, OSError):
            return None

    def _nodes(self, path: str) -> dict[str, str]:
        values = self.bus.read_many(f"{path}/{key}" for key in KEYS)
        return {key: value for key, value in zip(KEYS, values, strict=True) if value is not None}

    def _plug(self, path: str) -> None:
        nodes = self._nodes(path)
        if _script(nodes) != BLOCK_SCRIPT or nodes.get(STATUS) == CONNECTED:
            return
        found: dict[str, str] = {}
        error = None
        try:
            found = self._set_up(parse(path, nodes))
        except (DeviceError, OSError) as failure:
            error = failure
            self.log(f"{path}: {error_text(failure)}", level=4)
        told = False

        def tell(tx: Transaction) -> None:
            nonlocal told
            # A write would bring the nodes of a disk back that went meanwhile.
            told = tx.get(f"{path}/frontend-id") is not None
            if told and error is None:
                told_of = {**found, STATUS: CONNECTED}
                tx.write_many([(f"{path}/{key}", value) for key, value in told_of.items()])
            elif told and error is not None:
                tx.write_many(
                    [(f"{path}/{ERROR_TEXT}", error_text(error)), (f"{path}/{STATUS}", ERROR)]
                )

        self.bus.transact(tell, repeatable=True)
        if not told:
            self._unplug(path)

    def _set_up(self, plan: DiskPlan) -> dict[str, str]:
        """The nodes that say what blkback shall open. Raises DeviceError, OSError."""
        if plan.path in self.given:  # as far as this, and not written
            self._unplug(plan.path)
        fd = _open(plan)
        try:
            status = os.fstat(fd)
            if blockdev.identity(status) != plan.identity:
                raise DeviceError(f"{plan.target}: another file than when it was looked at")
            self._check(plan, fd, status)
            identity = blockdev.blocks(status)
            self._check_sharing(plan, identity)
            if not plan.file:
                device = os.major(status.st_rdev), os.minor(status.st_rdev)
                self.given[plan.path] = Given(identity, plan.writable)
                return {PHYSICAL_DEVICE: _device(*device)}
            try:
                number = blockdev.attach(fd, TAG + plan.path, writable=plan.writable)
            except FileNotFoundError as error:
                text = f"{plan.target}: this host has no loop devices"
                raise DeviceError(text, hint="modprobe loop") from error
            except OSError as error:
                raise DeviceError(f"{plan.target}: no loop device: {error.strerror}") from error
            self.given[plan.path] = Given(identity, plan.writable, number)
            sequence = blockdev.sequence(number)
            counted = {SEQUENCE: sequence} if sequence else {}
            return {**counted, PHYSICAL_DEVICE: _device(blockdev.MAJOR, number)}
        finally:
            os.close(fd)

    def _check(self, plan: DiskPlan, fd: int, status: os.stat_result) -> None:
        wanted = stat.S_ISREG if plan.file else stat.S_ISBLK
        if not wanted(status.st_mode):
            what = "regular file" if plan.file else "block device"
            raise DeviceError(f"{plan.target} is no {what}")
        if os.lseek(fd, 0, os.SEEK_END) < SECTOR:
            raise DeviceError(f"{plan.target} is smaller than a sector of {SECTOR} bytes")
        if not plan.file and plan.writable and blockdev.read_only(fd):
            raise _read_only(plan)

    def _check_sharing(self, plan: DiskPlan, identity: str) -> None:
        """Refuse what another guest, or Dom0, has open, unless all only read."""
        for path, other in self.given.items():
            if (other.writable or plan.writable) and blockdev.overlap(other.identity, identity):
                raise _shared(plan, path)
        for path, other in self._others():
            if (other.writable or plan.writable) and blockdev.overlap(other.identity, identity):
                raise _shared(plan, path)
        ours = {given.loop for given in self.given.values()}
        for number in blockdev.bound() if plan.file else ():
            loop = blockdev.look(number) if number not in ours else None
            if loop is None or loop.identity != identity or loop.tag == TAG + plan.path:
                continue
            if loop.writable or plan.writable:
                raise DeviceError(
                    f"{plan.target} is in use by {loop.path}",
                    hint=f"unmount it, or losetup -d {loop.path}",
                )

    def _others(self) -> Iterable[tuple[str, Given]]:
        """What blkback has open for disks that are not ours: those of another toolstack."""
        ours = {path.rpartition("backend/vbd/")[2].replace("/", "-") for path in self.given}
        try:
            names = os.listdir(self.sysfs)
        except FileNotFoundError:
            return
        for name in names:
            if not name.startswith("vbd-") or name.removeprefix("vbd-") in ours:
                continue
            try:
                with open(f"{self.sysfs}/{name}/physical_device", encoding="ascii") as file:
                    major, minor = (int(part, 16) for part in file.read().split(":"))
                with open(f"{self.sysfs}/{name}/mode", encoding="ascii") as file:
                    writable = "w" in file.read()
            except (OSError, ValueError):
                continue  # not open yet, or going
            path = "backend/vbd/" + name.removeprefix("vbd-").replace("-", "/")
            yield path, Given(blockdev.device_identity(major, minor), writable)

    def _unplug(self, path: str) -> None:
        given = self.given.pop(path, None)
        if given is not None and given.loop is not None:
            loop = self._look(given.loop)
            if loop is not None and loop.tag == TAG + path:
                self._detach(given.loop, path)

    def _look(self, number: int) -> blockdev.Loop | None:
        try:
            return blockdev.look(number)
        except OSError as error:
            self.log(f"/dev/loop{number} cannot be looked at: {error.strerror}", level=4)
            return None

    def _detach(self, number: int, path: str) -> None:
        try:
            blockdev.detach(number)
        except OSError as error:
            self.log(f"{path}: /dev/loop{number} stays: {error.strerror}", level=4)


def _open(plan: DiskPlan) -> int:
    """The target, open as the guest may use it. Raises DeviceError."""
    flags = (
        (os.O_RDWR if plan.writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    )
    if not plan.file:
        flags |= os.O_EXCL  # refused while it is mounted, or part of something
    try:
        return os.open(plan.target, flags)
    except OSError as error:
        if error.errno in {EBUSY, ETXTBSY}:
            text = f"{plan.target} is in use: mounted, or part of a volume"
            raise DeviceError(text, hint="umount, lsblk and dmsetup ls tell") from error
        if error.errno == EROFS or (plan.writable and error.errno in {EACCES, EPERM}):
            raise _read_only(plan) from error
        if error.errno == EINVAL:
            raise DeviceError(f"{plan.target}: what it is cannot hold a disk") from error
        raise DeviceError(f"{plan.target}: {error.strerror}") from error


def _read_only(plan: DiskPlan) -> DeviceError:
    return DeviceError(f"{plan.target} is read-only", hint="give the guest ro access")


def _shared(plan: DiskPlan, path: str) -> DeviceError:
    domid = path.rpartition("/")[0].rpartition("/")[2]
    return DeviceError(
        f"{plan.target} is a disk of domain {domid}",
        hint="guests may share a disk that all of them only read",
    )


def _script(nodes: Mapping[str, str]) -> str:
    return nodes.get("script", "").rpartition("/")[2]


def _device(major: int, minor: int) -> str:
    return f"{major:x}:{minor:x}"
