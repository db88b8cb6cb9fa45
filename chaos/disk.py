"""Disks: what is to hold their blocks, and vbds connected before the guest exists.

::

    toolstack                            blkback (Dom0's kernel)         xendevd
      | looks at the target
      | ring, grant, channel
      | frontend nodes, state 4  ----->   probe                    --->  opens the target,
      | backend nodes, state 1            maps ring, binds channel       a loop device,
      |                                   opens the device  <---------   physical-device
      | <------------------------------ state 4

What blkback reads is in drivers/block/xen-blkback/xenbus.c (backend_changed, connect_ring), the
ring in public/io/blkif.h. What the toolstack finds out about a target is what it can find out
without opening it, for a clear error before anything is made; xendevd opens it, and has the last
word (xendevd/block.py).
"""

from __future__ import annotations

import os
import stat
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from chaos import backend, device
from chaos.backend import CLOSED, CLOSING, CONNECTED
from chaos.device import DOM0, INITIALISING, Device, backend_path, frontend_path
from noxs import abi, blockdev, hotplug
from noxs.page import Vbd, VbdQueue
from xenctypes.errors import ConfigError, DeviceError, StateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from chaos.diskspec import DiskConfig
    from chaos.host import Host
    from chaos.registry import Registry
    from noxs.bus import Bus

KIND = "vbd"
PAGES = 1  # the ring
SECTOR = 512  # bytes
CONNECT_TIMEOUT = 30.0
RESTART_TIMEOUT = 10.0  # for xendevd to come back
DETACH_TIMEOUT = 10.0
BLKBACK = "/sys/bus/xen-backend/drivers/vbd"
SYS_BLOCK = "/sys/dev/block"
MOUNTS = "/proc/self/mountinfo"
FEATURES = {
    "feature-flush-cache": abi.VBD_FLUSH,
    "feature-barrier": abi.VBD_BARRIER,
    "feature-discard": abi.VBD_DISCARD,
    "discard-secure": abi.VBD_DISCARD_SECURE,
}
"""What of blkback's offers a guest may use just so; persistent grants it would have to ask for."""
NUMBERS = {
    "sectors": "sectors",
    "sector-size": "sector_size",
    "physical-sector-size": "physical_sector_size",
    "info": "info",
    "feature-max-indirect-segments": "max_segments",
    "discard-granularity": "discard_granularity",
    "discard-alignment": "discard_alignment",
}


class Target(NamedTuple):
    """What is to hold a disk's blocks.

    ``type`` is for the node of that name, ``identity`` is noxs.blockdev's, ``blocks`` the same for
    the file behind a loop device.
    """

    type: str
    identity: str
    blocks: str


def check_supported(config: DiskConfig) -> None:
    """Refuse what disks can be for xl and not for us. Raises ConfigError."""
    for refused, cause, hint in (
        (config.cdrom, "CD drives are not supported", "give the image as a disk with ro"),
        (config.removable, "removable disks are not supported", "leave removable out"),
        (
            config.format != "raw",
            f"format {config.format} is not supported, only raw is",
            f"qemu-img convert -f {config.format} -O raw makes one",
        ),
        (
            config.backendtype not in {"", "phy"},
            f"backendtype {config.backendtype} is not supported, blkback serves all disks",
            "leave backendtype out",
        ),
        (
            config.backend not in {"", "0", "Domain-0"},
            "disks served by another domain than Domain-0 are not supported",
            "leave backend out",
        ),
        (
            config.script.rpartition("/")[2] not in {"", "block", hotplug.BLOCK_SCRIPT},
            f"script {config.script}: xendevd runs no scripts",
            "leave script out, and name a file or a block device",
        ),
        (config.specification != "xen", "virtio disks are not supported", "use specification=xen"),
    ):
        if refused:
            raise ConfigError(f"disk {config.vdev}: {cause}", hint=hint, key="disk")


def path_of(config: DiskConfig) -> str:
    """The path of the target: in /dev if it does not start with a slash, as with xl."""
    return os.path.join("/dev", config.target)


def look(config: DiskConfig) -> Target:
    """The target of a disk, as far as can be told without opening it. Raises DeviceError."""
    if not os.path.isdir(BLKBACK):
        raise DeviceError("blkback is not loaded", hint="modprobe xen-blkback")
    if not hotplug.running():
        raise DeviceError("xendevd is not running", hint="start it: it sets up the disks")
    try:
        status = os.stat(path_of(config))
    except OSError as error:
        raise _error(config, error.strerror or str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise _error(config, "is a directory", "name a file in raw format, or a block device")
    if stat.S_ISBLK(status.st_mode):
        return _look_at_device(config, status)
    if not stat.S_ISREG(status.st_mode):
        raise _error(config, "is neither a file nor a block device")
    if config.writable and not status.st_mode & 0o222:
        raise _error(config, "is read-only", "chmod u+w, or give the guest ro access")
    if status.st_size < SECTOR:
        raise _error(
            config, f"has {status.st_size} bytes, less than a sector", "truncate -s makes it larger"
        )
    identity = blockdev.identity(status)
    return Target(hotplug.TYPE_FILE, identity, identity)


def _look_at_device(config: DiskConfig, status: os.stat_result) -> Target:
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    base = f"{SYS_BLOCK}/{number}"
    if config.writable and _read(f"{base}/ro") == "1":
        raise _error(config, "is read-only", "give the guest ro access")
    if _read(f"{base}/size") == "0":
        raise _error(config, "has no sectors", "does it have a medium?")
    mounted = _mounted_on(number)
    if mounted:
        raise _error(config, f"is mounted on {mounted}", f"umount {mounted}")
    holders = os.listdir(f"{base}/holders") if os.path.isdir(f"{base}/holders") else []
    if holders:
        raise _error(config, f"is part of {', '.join(sorted(holders))}", "take it out there first")
    identity = blocks = blockdev.identity(status)
    behind = _read(f"{base}/loop/backing_file")
    if behind:
        try:
            blocks = blockdev.identity(os.stat(behind))
        except OSError:
            blocks = identity  # deleted, or not in sight: xendevd knows better
    return Target(hotplug.TYPE_DEVICE, identity, blocks)


def _mounted_on(number: str) -> str:
    with open(MOUNTS, encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            words = line.split()
            if words[2] == number:
                return words[4]
    return ""


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""


def _error(config: DiskConfig, cause: str, hint: str = "") -> DeviceError:
    return DeviceError(f"disk {config.vdev}: {path_of(config)}: {cause}", hint=hint)


def check_free(names: Registry, uuid: str, disks: Sequence[tuple[DiskConfig, Target]]) -> None:
    """Raise DeviceError if another domain of ours has a disk that these may not share.

    Also if two of these are the same.
    """
    taken: list[tuple[str, dict[str, Any]]] = []
    for config, target in disks:
        _refuse_shared(config, target, taken)
        taken.append(("this domain", entry(config, target)))
    others = []
    for other in names.uuids():
        try:
            record = names.read(other) if other != uuid else None
        except StateError:
            continue  # damaged: xendevd knows what is in use
        if record is not None:
            others += [(f'"{record.name}"', disk) for disk in record.disks]
    for config, target in disks:
        _refuse_shared(config, target, others)


def _refuse_shared(
    config: DiskConfig, target: Target, others: Iterable[tuple[str, dict[str, Any]]]
) -> None:
    for owner, disk in others:
        shared = blockdev.overlap(disk["blocks"], target.blocks)
        if shared and (config.writable or disk["writable"]):
            raise _error(
                config,
                f"is a disk of {owner} already",
                "guests may share a disk that all of them only read",
            )


def entry(config: DiskConfig, target: Target) -> dict[str, Any]:
    """What the record of a domain says of a disk."""
    return {"vdev": config.vdev, "writable": config.writable, **target._asdict()}


def target_of(entry: dict[str, Any]) -> Target:
    """The target that a record tells of."""
    return Target(entry["type"], entry["identity"], entry["blocks"])


class PreparedDisk(NamedTuple):
    """A vbd of a shell: its ring's ``pfn`` and machine ``frame``, grant and channel.

    ``offers`` is what blkback said of it, by the names of noxs.page.Vbd.
    """

    config: DiskConfig
    target: Target
    pfn: int
    frame: int
    gref: int
    port: int
    offers: dict[str, int] = {}  # noqa: RUF012 - never changed in place

    def describe(self) -> Vbd:
        """The disk as the guest reads of it."""
        queue = VbdQueue(self.port, (self.pfn,), (self.gref,))
        return Vbd(handle=self.config.devid, queues=(queue,), backend=DOM0, **self.offers)


def seed(host: Host, domid: int, disks: Sequence[PreparedDisk]) -> None:
    """Initialise the rings and grant them to Dom0. Raises CallFailed."""
    from chaos.vif import GRANT_ENTRY, GTF_PERMIT_ACCESS, SRING, XENMEM_GRANT_TABLE

    with host.memory.map(domid, [disk.frame for disk in disks]) as pages:
        for index in range(len(disks)):
            SRING.pack_into(pages.view, index * abi.PAGE_SIZE, 0, 1, 0, 1)
    with host.memory.map_resource(domid, XENMEM_GRANT_TABLE, 0, 0, 1) as table:
        for disk in disks:
            at = disk.gref * GRANT_ENTRY.size
            GRANT_ENTRY.pack_into(table.view, at, GTF_PERMIT_ACCESS, DOM0, disk.frame)


def backend_nodes(config: DiskConfig, target: Target) -> dict[str, str | int]:
    """What only disks have in the backend's directory, for blkback and for xendevd."""
    discard = config.writable if config.discard is None else config.discard
    return {
        "dev": config.vdev,
        "type": target.type,
        "params": path_of(config),
        "mode": "w" if config.writable else "r",
        "device-type": "disk",
        "removable": int(config.removable),
        "bootable": 1,
        "discard-enable": int(discard),
        "direct-io-safe": int(config.direct_io_safe),
        "script": hotplug.BLOCK_SCRIPT,
        hotplug.IDENTITY: target.identity,
        hotplug.STATUS: hotplug.PENDING,
    }


def frontend_nodes(config: DiskConfig) -> dict[str, str | int]:
    """What a stock guest's front end reads, beside what all devices have."""
    nodes: dict[str, str | int] = {"virtual-device": config.devid, "device-type": "disk"}
    if not config.trusted:
        nodes["trusted"] = 0
    return nodes


def devices(configs: Sequence[DiskConfig], targets: Sequence[Target]) -> list[Device]:
    """The disks of a stock guest, which connects them itself."""
    return [
        Device(KIND, config.devid, frontend_nodes(config), backend_nodes(config, target))
        for config, target in zip(configs, targets, strict=True)
    ]


def nodes(domid: int, disk: PreparedDisk) -> list[tuple[str, str | int]]:
    """What the bus must say of a vbd for blkback to connect it, the backend's part last."""
    devid = disk.config.devid
    back = backend_path(domid, KIND, devid)
    front = frontend_path(domid, KIND, devid)
    fronts = {
        "backend": back,
        "backend-id": DOM0,
        **frontend_nodes(disk.config),
        "ring-ref": disk.gref,
        "event-channel": disk.port,
        "protocol": "x86_64-abi",
        "state": CONNECTED,
    }
    backs = {
        "frontend": front,
        "frontend-id": domid,
        "online": 1,
        **backend_nodes(disk.config, disk.target),
        "state": INITIALISING,
    }
    return [
        *((f"{front}/{key}", value) for key, value in fronts.items()),
        *((f"{back}/{key}", value) for key, value in backs.items()),
    ]


def announce(bus: Bus, domid: int, disks: Sequence[PreparedDisk]) -> None:
    """Write the nodes of ``disks``, for xendevd and blkback to see."""
    disconnect_all(bus, domid)  # a domid comes round again: nothing of its last owner may count
    pairs = [pair for disk in disks for pair in nodes(domid, disk)]
    device.make(bus, domid, KIND, disks[0].config.devid, lambda tx: tx.write_many(pairs))


def connect(bus: Bus, domid: int, disks: Sequence[PreparedDisk]) -> list[PreparedDisk]:
    """Wait until blkback has connected all of ``disks``, which were announced.

    Returns them with what it offers. Raises DeviceError with what xendevd or blkback gave as the
    reason.
    """
    configs = [disk.config for disk in disks]
    await_progress(bus, domid, configs, connected=True)
    return [disk._replace(offers=_offers(bus, domid, disk.config.devid)) for disk in disks]


def await_progress(bus: Bus, domid: int, configs: Sequence[DiskConfig], *, connected: bool) -> None:
    """Wait until xendevd has set up the disks or, with ``connected``, blkback connected them.

    Raises DeviceError with the reason why not.
    """
    waiting = {config.devid: config for config in configs}
    served = time.monotonic()
    with backend.watching(bus, backend.directory(domid, KIND)) as changes:
        for _ in changes(CONNECT_TIMEOUT):
            states = {devid: _progress(bus, domid, config) for devid, config in waiting.items()}
            waiting = {
                devid: waiting[devid]
                for devid, (state, status) in states.items()
                if status != hotplug.CONNECTED or (connected and state != CONNECTED)
            }
            if not waiting:
                return
            unserved = any(states[devid][1] != hotplug.CONNECTED for devid in waiting)
            if hotplug.running() or not unserved:
                served = time.monotonic()
            elif time.monotonic() > served + RESTART_TIMEOUT:
                raise DeviceError(
                    f"disk {_first(waiting)}: xendevd ended before it was set up",
                    hint="start it, and look into its log for why it ended",
                )
    raise DeviceError(
        f"disk {_first(waiting)}: not connected within {CONNECT_TIMEOUT:.0f} s",
        hint="do xendevd and blkback run?",
    )


def _first(waiting: dict[int, DiskConfig]) -> str:
    return waiting[min(waiting)].vdev


def _progress(bus: Bus, domid: int, config: DiskConfig) -> tuple[str | None, str | None]:
    """A backend's state and hotplug status. DeviceError when it will get no further."""
    path = backend_path(domid, KIND, config.devid)
    paths = [f"{path}/{key}" for key in ("state", hotplug.STATUS, hotplug.ERROR_TEXT)]
    state, status, why, said = bus.read_many(
        [*paths, backend.error_path(domid, KIND, config.devid)]
    )
    if status == hotplug.ERROR:
        raise DeviceError(f"disk {config.vdev}: {why or 'xendevd could not set it up'}")
    if said or state in {CLOSING, CLOSED}:
        reason = f": {' '.join(said.split())}" if said else ""
        raise DeviceError(
            f"disk {config.vdev}: blkback refused it{reason}", hint="dmesg may say more"
        )
    return state, status


def _offers(bus: Bus, domid: int, devid: int) -> dict[str, int]:
    path = backend_path(domid, KIND, devid)
    values = bus.read_many(f"{path}/{key}" for key in (*NUMBERS, *FEATURES))
    said = dict(zip((*NUMBERS, *FEATURES), values, strict=True))
    offers = {name: int(said[key] or 0) for key, name in NUMBERS.items() if said[key] is not None}
    features = sum(bit for key, bit in FEATURES.items() if said[key] == "1")
    if offers.get("max_segments"):
        features |= abi.VBD_INDIRECT
    return {**offers, "features": features}


def disconnect_all(bus: Bus, domid: int) -> None:
    """Have blkback let go of whatever disks the bus knows of a domain, and remove their nodes.

    Raises DeviceError as ``disconnect`` does.
    """
    if devids := backend.known(bus, domid, KIND):
        disconnect(bus, domid, devids)


def disconnect(bus: Bus, domid: int, devids: Sequence[int]) -> None:
    """Have blkback let go of disks, and remove their nodes; missing ones are fine.

    Then xendevd detaches their loop devices, which is waited for as long as it runs: the next guest
    may want the files. Raises DeviceError if one stays.
    """
    loops = list(_loops(bus, domid, devids))
    if devids:
        backend.close(bus, domid, KIND, devids)
    deadline = time.monotonic() + DETACH_TIMEOUT
    for loop in loops:
        if not backend.wait_for(deadline, partial(_let_go, loop)):
            raise DeviceError(
                f"{loop.file} is still held by loop{loop.number}",
                hint="requests of the guest may be under way; losetup -a shows it",
            )


class LoopDevice(NamedTuple):
    """A loop device that was made for a disk: its number, its ``file``, and its ``sequence``.

    The number comes to mean another guest's file, or the same one, as soon as this guest's is let
    go: by the sequence, where the kernel counts, that is another loop device.
    """

    number: int
    file: str
    sequence: str

    def held(self) -> bool:
        """Whether the file is still behind it."""
        if self.sequence and blockdev.sequence(self.number) != self.sequence:
            return False
        return bool(self.file) and _backing_file(self.number) == self.file


def _loops(bus: Bus, domid: int, devids: Sequence[int]) -> Iterator[LoopDevice]:
    """Of these disks the loop devices that are there, as far as sysfs tells.

    What the bus says may be old: xendevd detaches a loop device when the back end goes, which a
    guest can bring about by itself.
    """
    paths = [backend_path(domid, KIND, devid) for devid in devids]
    keys = ("type", hotplug.PHYSICAL_DEVICE, hotplug.SEQUENCE)
    said = [bus.read_many(f"{path}/{key}" for path in paths) for key in keys]
    for kind, numbers, sequence in zip(*said, strict=True):
        major, _, minor = (numbers or "").partition(":")
        if kind == hotplug.TYPE_FILE and major == f"{blockdev.MAJOR:x}" and minor:
            number = int(minor, 16)
            loop = LoopDevice(number, _backing_file(number), sequence or "")
            if loop.held():
                yield loop


def _let_go(loop: LoopDevice) -> bool:
    return not loop.held() or not hotplug.running()


def _backing_file(number: int) -> str:
    return _read(f"{blockdev.SYSFS}/loop{number}/loop/backing_file")
