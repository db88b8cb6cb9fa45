"""A stock guest's XenStore: a private one of storesd's, or xenstored's, which it is introduced to.

::

    nothing --open--> nodes --attach--> devices offered, vifs plugged --introduce--> ring served
       ^                                                                                |
       +------------------------------------ release -----------------------------------+

Whatever serves it holds the guest's ring page: a domain that is destroyed stays a zombie until it
is released.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chaos import device, disk, vif, xenstored
from chaos.steps import BUS, DEVICES, EXECUTE, Step
from xenctypes.errors import BusError, DeviceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chaos.device import Device, Value
    from chaos.domconfig import DomainConfig
    from chaos.host import Host
    from chaos.registry import Record
    from noxs.bus import Bus, Transaction

PRIVATE, SHARED = "storesd", "xenstored"
"""Who serves a guest's store, as records have it; "" is nobody."""
REQUEST = "control/shutdown"


def service(host: Host) -> str:
    """Who serves stock guests on this host: PRIVATE, SHARED, or "" if nobody does."""
    if xenstored.serves(host):
        return SHARED
    return PRIVATE if serves() else ""


def serves() -> bool:
    """Whether storesd runs."""
    from noxs import gueststores

    return gueststores.running()


def check(config: DomainConfig, served: str) -> None:
    """Refuse what takes a store where there is none. Raises DeviceError."""
    if (config.vifs or config.disks) and not served:
        raise DeviceError(
            "storesd is not running: a guest that does not speak noxs needs it for its devices",
            hint="start storesd, or leave vif= and disk= out",
        )


@dataclass
class Tenancy:
    """A stock guest's place in a store. ``service`` is PRIVATE or SHARED.

    ``port`` is the guest's end of its store channel, ``frame`` that of the ring's page, ``targets``
    what holds its disks.
    """

    host: Host
    service: str
    domid: int
    uuid: str
    config: DomainConfig
    macs: Sequence[bytes]
    port: int
    frame: int
    targets: Sequence[disk.Target] = ()
    opened: bool = False
    attached: bool = False

    @property
    def gone(self) -> bool:
        """Whether nothing of it is left, neither in a store nor on the bus."""
        return not (self.opened or self.attached)

    @property
    def devices(self) -> list[Device]:
        """What the guest is to have."""
        config = self.config
        vifs = vif.devices(config.name, self.macs, config.vifs)
        return vifs + disk.devices(config.disks, self.targets)


def open_store(tenancy: Tenancy) -> None:
    """Make the guest's nodes. Raises BusError."""
    host, domid, uuid = tenancy.host, tenancy.domid, tenancy.uuid
    tenancy.opened = True
    if tenancy.config.vifs:
        vif.disconnect_all(host.bus, domid)  # a domid comes round again
    if tenancy.config.disks:
        disk.disconnect_all(host.bus, domid)
    nodes = _build_nodes(domid, tenancy.config)
    if tenancy.service == PRIVATE:
        host.stores.open(domid, uuid, tenancy.config.name)
        host.stores.write_many(nodes)
        return
    from noxs import wire
    from noxs.guestview import skeleton
    from noxs.nodes import result

    requests = []
    for path, value, perms in skeleton(domid, uuid, tenancy.config.name):
        subject, name = path.decode(), path + b"\0"
        requests += [
            (wire.WRITE, name + value, subject),
            (wire.SET_PERMS, name + wire.format_perms(perms), subject),
        ]

    def write(tx: Transaction) -> None:
        tx.rm_many([f"/local/domain/{domid}", f"/vm/{uuid}"])
        for pair in zip(requests, tx.exchange(requests), strict=True):
            result(*pair)
        tx.write_many(nodes)

    host.bus.transact(write, repeatable=True)


def _build_nodes(domid: int, config: DomainConfig) -> list[tuple[str, Value]]:
    """What the guest reads of its memory and vCPUs; as libxl__build_post() has it.

    Linux takes static-max for the size of a PVH guest's memory map (watch_target() in its
    drivers/xen/xen-balloon.c), which with us ends at ``memory``; libxl's ends at maxmem.
    """
    base = f"/local/domain/{domid}"
    static_max = config.memory if config.type == "pvh" else config.maxmem
    return [
        (f"{base}/memory/static-max", static_max * 1024),
        (f"{base}/memory/target", config.memory * 1024),
        *(
            (f"{base}/cpu/{n}/availability", "online" if n < config.vcpus else "offline")
            for n in range(config.maxvcpus)
        ),
    ]


def attach_devices(tenancy: Tenancy) -> None:
    """Offer the guest its devices, and wait until they are plugged. BusError, DeviceError."""
    devices = tenancy.devices
    if not devices:
        return
    host, domid = tenancy.host, tenancy.domid
    tenancy.attached = True
    _offer(host, tenancy.service, domid, devices)
    vif.await_plugged(host.bus, domid, [each.devid for each in devices if each.kind == "vif"])
    disk.await_progress(host.bus, domid, tenancy.config.disks, connected=False)


def _offer(host: Host, served: str, domid: int, devices: Sequence[Device]) -> None:
    device.offer(host.bus, domid, devices, shared=served == SHARED)
    if served == PRIVATE:
        for each in devices:
            host.stores.attach(domid, each.kind, each.devid, each.front)


def detach_devices(tenancy: Tenancy) -> None:
    """Undo ``attach_devices``. Raises ChaosError."""
    if tenancy.attached:
        vif.disconnect_all(tenancy.host.bus, tenancy.domid)
        disk.disconnect_all(tenancy.host.bus, tenancy.domid)
        tenancy.attached = False


def introduce(tenancy: Tenancy) -> None:
    """Have the guest's ring served, from before it runs. Raises BusError."""
    host = tenancy.host
    if tenancy.service == PRIVATE:
        host.stores.introduce(tenancy.domid, 0, tenancy.port)
    else:
        host.bus.introduce(tenancy.domid, tenancy.frame, tenancy.port)


def close_store(tenancy: Tenancy) -> None:
    """Undo ``open_store`` and ``introduce``. Raises BusError."""
    if tenancy.opened:
        release(tenancy.host, tenancy.service, tenancy.domid, tenancy.uuid)
        tenancy.opened = False


STEPS: tuple[Step[Tenancy], ...] = (
    Step("open store", EXECUTE, BUS, open_store, close_store),
    Step("attach devices", EXECUTE, DEVICES, attach_devices, detach_devices),
    Step("introduce", EXECUTE, BUS, introduce),
)


def readdress(tenancy: Tenancy) -> None:
    """Let store and vifs say what was not known when they were made: name, addresses. BusError."""
    host, domid, config = tenancy.host, tenancy.domid, tenancy.config
    own = _names(domid, tenancy.uuid, config.name)
    shared = vif.late_nodes(domid, config.name, tenancy.macs, config.vifs)
    if tenancy.service == PRIVATE:
        fronts = [pair for pair in shared if pair[0].startswith(f"/local/domain/{domid}/")]
        host.stores.write_many(own + fronts)
    else:
        shared = own + shared
    if shared:
        host.bus.write_many(shared)


def _names(domid: int, uuid: str, name: str) -> list[tuple[str, str]]:
    return [(f"/local/domain/{domid}/name", name), (f"/vm/{uuid}/name", name)]


def attach_disks(tenancy: Tenancy) -> None:
    """Offer a guest that has all but its disks these, and wait until they are set up.

    Raises BusError, DeviceError.
    """
    host, domid, config = tenancy.host, tenancy.domid, tenancy.config
    disk.disconnect_all(host.bus, domid)  # a domid comes round again
    tenancy.attached = True
    _offer(host, tenancy.service, domid, disk.devices(config.disks, tenancy.targets))
    disk.await_progress(host.bus, domid, config.disks, connected=False)


def detach_disks(tenancy: Tenancy) -> None:
    """Undo ``attach_disks``. Raises ChaosError."""
    if tenancy.attached:
        disk.disconnect_all(tenancy.host.bus, tenancy.domid)
        tenancy.attached = False


LATE_STEPS: tuple[Step[Tenancy], ...] = (Step("readdress", EXECUTE, BUS, readdress),)
"""For a shell, which has its store and its devices, instead of STEPS."""
DISK_STEPS: tuple[Step[Tenancy], ...] = (
    Step("attach disks", EXECUTE, DEVICES, attach_disks, detach_disks),
)
"""After LATE_STEPS for a shell of the pool's: its guest's disks are its guest's alone."""


def release(host: Host, served: str, domid: int, uuid: str) -> bool:
    """Have a guest's ring and nodes given up; of one that is not served is fine. BusError.

    False: storesd does not run. What it held went with it; when it starts it serves those again
    that are alive then.
    """
    if served == SHARED:
        try:
            host.bus.release(domid)
        except BusError as error:
            if error.errno not in {errno.ENOENT, errno.EINVAL}:  # EINVAL: it was not introduced
                raise
        host.bus.rm_many([f"/local/domain/{domid}", f"/vm/{uuid}"])
    elif served == PRIVATE:
        if not serves():
            return False
        host.stores.release(domid)
    return True


def attach_device(host: Host, record: Record, offered: Device) -> None:
    """Offer a device to a guest that runs. Raises BusError."""
    _offer(host, record.store, record.domid, [offered])


def detach_device(host: Host, record: Record, kind: str, devid: int) -> None:
    """Take a device out of a guest's store; its back end's nodes stay. BusError."""
    if record.store == PRIVATE:
        host.stores.detach(record.domid, kind, devid)


def rename(host: Host, record: Record) -> None:
    """Let a guest know its new name. Raises BusError."""
    pairs = _names(record.domid, record.uuid, record.name)
    if record.store == SHARED:
        host.bus.write_many(pairs)
    elif record.store == PRIVATE and serves():
        host.stores.write_many(pairs)


def tell(host: Host, record: Record, pairs: Mapping[str, Value]) -> None:
    """Write nodes below the guest's directory, which it watches. Raises BusError."""
    base = f"/local/domain/{record.domid}"
    _nodes(host, record).write_many([(f"{base}/{key}", value) for key, value in pairs.items()])


def request(host: Host, record: Record, word: str) -> None:
    """Write what the guest is to do, such as "poweroff", where it looks for it. BusError."""
    tell(host, record, {REQUEST: word})


def requested(host: Host, record: Record) -> str | None:
    """What the guest has left of its request: "" once it took it; None: it has no store."""
    return _nodes(host, record).get(f"/local/domain/{record.domid}/{REQUEST}")


def _nodes(host: Host, record: Record) -> Bus:
    return host.stores if record.store == PRIVATE else host.bus
