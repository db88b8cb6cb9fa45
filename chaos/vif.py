"""Vifs connected before the guest exists, and those that a stock guest connects itself.

For a noxs guest the toolstack plays netfront while the shell is empty: it lays the rings out in
pages at the top of the shell's memory, posts receive buffers, seeds the grant
table, allocates the event channel, and writes the nodes that netback reads. The
guest finds the result in its device page and starts to send.

::

    toolstack                          netback (Dom0's kernel)         xendevd
      | rings, grants, channel
      | frontend nodes, state 4  --->   probe: vifN.M appears   --->   plugs it,
      | backend nodes, state 1          maps rings, binds channel      hotplug-status
      | <--------------- backend state 4, once it reads "connected" <---'

What netback reads is in drivers/net/xen-netback/xenbus.c (connect,
connect_data_rings, read_xenbus_vif_flags); the rings in public/io/netif.h.
"""

from __future__ import annotations

import os
import time
from itertools import compress
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from chaos import backend, device
from chaos.backend import CLOSED, CLOSING, CONNECTED
from chaos.device import DOM0, INITIALISING, Device
from noxs import abi, hotplug
from noxs.page import Vif, VifQueue
from xenctypes.errors import DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Sequence

    from chaos.device import Value
    from chaos.host import Host
    from chaos.netspec import VlanConfig
    from chaos.vifspec import VifConfig
    from noxs.bus import Bus, Transaction

POSTED = 8  # receive buffers in the ring before the guest runs
PAGES = 2 + POSTED  # tx ring, rx ring, buffers
FIRST_GREF = 8  # GNTTAB_NR_RESERVED_ENTRIES, public/grant_table.h
GRANT_ENTRY = Struct("@HHI")  # grant_entry_v1: flags, domid, frame
GRANT_ENTRIES = 512  # in the table's first frame
GTF_PERMIT_ACCESS = 1
SRING = Struct("@4I")  # req_prod, req_event, rsp_prod, rsp_event (public/io/ring.h)
SRING_REQUESTS = 64
RX_REQUEST = Struct("@HHI")  # netif_rx_request: id, pad, gref
RX_ENTRY_SIZE = 8
XENMEM_GRANT_TABLE = 1  # XENMEM_resource_grant_table
KIND = "vif"
CONNECT_TIMEOUT = 30.0
RESTART_TIMEOUT = 10.0  # for xendevd to come back
FORWARD_TIMEOUT = 2.0  # a port that somebody shut stays shut
BRIDGE_PORT_DISABLED = "0"  # BR_STATE_DISABLED of linux/if_bridge.h
NETBACK = "/sys/bus/xen-backend/drivers/vif"
OPEN_VSWITCH = "/run/openvswitch/db.sock"
MTU = 1500
FEATURES = (
    abi.VIF_RX_SG | abi.VIF_RX_CSUM_BLANK | abi.VIF_RX_NOTIFY | abi.VIF_TX_SG
    | abi.VIF_TX_CSUM_BLANK
)  # fmt: skip


class PreparedVif(NamedTuple):
    """A vif of a shell: where its pages, grants and channel are.

    ``pfn`` is the guest page of its first of PAGES pages, ``frames`` their machine frames,
    ``gref`` the first of as many grant references, ``port`` the guest's event channel,
    ``mtu`` in bytes.
    """

    config: VifConfig
    mac: bytes
    pfn: int
    frames: tuple[int, ...]
    gref: int
    port: int
    mtu: int = MTU

    def describe(self) -> Vif:
        """The vif as the guest reads of it."""
        config = self.config
        queue = VifQueue(
            tx_pfn=self.pfn,
            tx_gref=self.gref,
            rx_pfn=self.pfn + 1,
            rx_gref=self.gref + 1,
            tx_evtchn=self.port,
            rx_evtchn=self.port,
            posted_pfn=self.pfn + 2,
            posted_gref=self.gref + 2,
            posted_count=POSTED,
        )
        ipv4, ipv6 = config.ipv4, config.ipv6
        return Vif(
            handle=config.devid,
            mac=self.mac,
            queues=(queue,),
            backend=DOM0,
            features=FEATURES,
            mtu=self.mtu,
            ipv4=ipv4.ip.packed if ipv4 else b"",
            ipv4_prefix=ipv4.network.prefixlen if ipv4 else 0,
            ipv4_gateway=config.gateway4.packed if config.gateway4 else b"",
            ipv6=ipv6.ip.packed if ipv6 else b"",
            ipv6_prefix=ipv6.network.prefixlen if ipv6 else 0,
            ipv6_gateway=config.gateway6.packed if config.gateway6 else b"",
        )


def seed(host: Host, domid: int, vifs: Sequence[PreparedVif]) -> None:
    """Initialise the rings and grant every page of ``vifs`` to Dom0. Raises CallFailed."""
    frames = [frame for vif in vifs for frame in vif.frames]
    with host.memory.map(domid, frames) as pages:
        view = pages.view
        for index, vif in enumerate(vifs):
            _init_rings(view[index * PAGES * abi.PAGE_SIZE :], vif)
    with host.memory.map_resource(domid, XENMEM_GRANT_TABLE, 0, 0, 1) as table:
        for vif in vifs:
            for offset, frame in enumerate(vif.frames):
                at = (vif.gref + offset) * GRANT_ENTRY.size
                GRANT_ENTRY.pack_into(table.view, at, GTF_PERMIT_ACCESS, DOM0, frame)


def _init_rings(view: memoryview, vif: PreparedVif) -> None:
    SRING.pack_into(view, 0, 0, 1, 0, 1)
    rx = abi.PAGE_SIZE
    for index in range(POSTED):
        at = rx + SRING_REQUESTS + index * RX_ENTRY_SIZE
        RX_REQUEST.pack_into(view, at, index, 0, vif.gref + 2 + index)
    SRING.pack_into(view, rx, POSTED, 1, 0, 1)


def backend_path(domid: int, devid: int) -> str:
    """The backend's directory on the bus."""
    return device.backend_path(domid, KIND, devid)


def frontend_path(domid: int, devid: int) -> str:
    """The frontend's directory on the bus."""
    return device.frontend_path(domid, KIND, devid)


def nodes(domid: int, name: str, vif: PreparedVif) -> list[tuple[str, str]]:
    """What the bus must say of a vif for netback to connect it, the backend's part last."""
    config = vif.config
    backend, frontend = backend_path(domid, config.devid), frontend_path(domid, config.devid)
    front = {
        "backend": backend,
        "backend-id": DOM0,
        "state": CONNECTED,
        "handle": config.devid,
        "mac": mac_text(vif.mac),
        "tx-ring-ref": vif.gref,
        "rx-ring-ref": vif.gref + 1,
        "event-channel": vif.port,
        "request-rx-copy": 1,
        "feature-rx-notify": 1,
        "feature-sg": 1,
    }
    back = {
        "frontend": frontend,
        "frontend-id": domid,
        "online": 1,
        **_backend_nodes(name, vif.mac, config),
        "state": INITIALISING,
    }
    return [
        *((f"{frontend}/{key}", str(value)) for key, value in front.items()),
        *((f"{backend}/{key}", str(value)) for key, value in back.items()),
    ]


def _backend_nodes(name: str, mac: bytes, config: VifConfig) -> dict[str, Value]:
    """What only vifs have in the backend's directory, for netback and for xendevd."""
    back: dict[str, Value] = {
        "handle": config.devid,
        "mac": mac_text(mac),
        "bridge": config.bridge,
        "domain": name,
        "type": "vif",
        "script": hotplug.script_for(config.script),
        hotplug.STATUS: hotplug.PENDING,
    }
    if config.vifname:
        back["vifname"] = config.vifname
    if config.mtu:
        back["mtu"] = config.mtu
    if config.rate is not None:
        back["rate"] = str(config.rate)
    if config.vlan is not None:
        back["vlan"] = vlan_text(config.vlan)
    return back


def devices(name: str, macs: Sequence[bytes], configs: Sequence[VifConfig]) -> list[Device]:
    """The vifs of a stock guest, which connects them itself; as libxl__set_xenstore_vif()."""
    found = []
    for mac, config in zip(macs, configs, strict=True):
        front: dict[str, Value] = {"handle": config.devid, "mac": mac_text(mac)}
        if config.mtu:
            front["mtu"] = config.mtu
        if not config.trusted:
            front["trusted"] = 0
        found.append(Device("vif", config.devid, front, _backend_nodes(name, mac, config)))
    return found


def late_nodes(
    domid: int, name: str, macs: Sequence[bytes], configs: Sequence[VifConfig]
) -> list[tuple[str, str]]:
    """What ``nodes`` says of a vif whose name and address came after it was connected.

    Nobody acts on it: netback read its part when it connected, and needs neither.
    """
    pairs = []
    for mac, config in zip(macs, configs, strict=True):
        backend = backend_path(domid, config.devid)
        pairs += [
            (f"{backend}/domain", name),
            (f"{backend}/mac", mac_text(mac)),
            (f"{frontend_path(domid, config.devid)}/mac", mac_text(mac)),
        ]
    return pairs


def update(bus: Bus, pairs: Sequence[tuple[str, str]]) -> None:
    """Change nodes that are there; none that were removed come back."""

    def write(tx: Transaction) -> None:
        values = tx.read_many([path for path, _ in pairs])
        present = [value is not None for value in values]
        tx.write_many(list(compress(pairs, present)))

    bus.transact(write)


def mac_text(mac: bytes) -> str:
    """A MAC address in the usual notation."""
    return mac.hex(":")


def vlan_text(vlan: VlanConfig) -> str:
    """VLANs in the notation of xl-network-configuration(5), which xendevd reads."""
    others = (f"{vid}u" for vid in vlan.untagged if vid != vlan.pvid)
    return "/".join([f"{vlan.pvid}p", *others, *map(str, vlan.tagged)])


def check(config: VifConfig) -> None:
    """Refuse what cannot work before anything is made. Raises DeviceError."""
    if not os.path.isdir(NETBACK):
        raise DeviceError("netback is not loaded", hint="modprobe xen-netback")
    if not hotplug.running():
        raise DeviceError("xendevd is not running", hint="start it: it plugs the vifs")
    hotplug.script_for(config.script)
    linux = os.path.isdir(f"/sys/class/net/{config.bridge}/bridge") and not config.openvswitch
    if not linux and not os.path.exists(OPEN_VSWITCH):
        if config.openvswitch:
            raise DeviceError(
                f'vif {config.devid}: there is no Open vSwitch for bridge "{config.bridge}"',
                hint="start openvswitch-switch",
            )
        raise DeviceError(
            f'vif {config.devid}: there is no bridge "{config.bridge}"',
            hint=f"ip link add {config.bridge} type bridge",
        )
    if config.vifname and os.path.exists(f"/sys/class/net/{config.vifname}"):
        raise DeviceError(
            f'vif {config.devid}: an interface "{config.vifname}" exists already',
            hint="choose another vifname=",
        )


def announce(bus: Bus, domid: int, name: str, vifs: Sequence[PreparedVif]) -> None:
    """Write the nodes of ``vifs``, for xendevd and netback to see."""
    disconnect_all(bus, domid)  # a domid comes round again: nothing of its last owner may count
    pairs = [pair for vif in vifs for pair in nodes(domid, name, vif)]
    device.make(bus, domid, KIND, vifs[0].config.devid, lambda tx: tx.write_many(pairs))


def connect(bus: Bus, domid: int, vifs: Sequence[PreparedVif]) -> list[PreparedVif]:
    """Wait until netback has connected all of ``vifs``, which were announced.

    Returns them with the MTU that their interfaces got. Raises DeviceError with what xendevd or
    netback gave as the reason.
    """
    _await_all(bus, domid, [vif.config.devid for vif in vifs], _connected)
    deadline = time.monotonic() + FORWARD_TIMEOUT
    backend.wait_for(deadline, lambda: all(_forwards(domid, vif.config) for vif in vifs))
    return [vif._replace(mtu=_mtu(domid, vif.config)) for vif in vifs]


def await_plugged(bus: Bus, domid: int, devids: Sequence[int]) -> None:
    """Wait until the vifs of a stock guest are plugged, which happens before it runs.

    Raises DeviceError as ``connect`` does.
    """
    if devids:
        _await_all(bus, domid, devids, _plugged)


def _await_all(
    bus: Bus, domid: int, devids: Sequence[int], done: Callable[[Bus, int, int], bool]
) -> None:
    waiting = set(devids)
    served = time.monotonic()
    with backend.watching(bus, backend.directory(domid, KIND)) as changes:
        for _ in changes(CONNECT_TIMEOUT):
            waiting = {devid for devid in waiting if not done(bus, domid, devid)}
            if not waiting:
                return
            if hotplug.running() or not _unplugged(bus, domid, waiting):
                served = time.monotonic()
            elif time.monotonic() > served + RESTART_TIMEOUT:
                raise DeviceError(
                    f"vif {min(waiting)}: xendevd ended before it was plugged",
                    hint="start it, and look into its log for why it ended",
                )
    devid = min(waiting)
    raise DeviceError(
        f"vif {devid}: not connected within {CONNECT_TIMEOUT:.0f} s"
        + _netback_error(bus, domid, devid),
        hint="do xendevd and netback run?",
    )


def _connected(bus: Bus, domid: int, devid: int) -> bool:
    return _progress(bus, domid, devid)[0] == CONNECTED


def _plugged(bus: Bus, domid: int, devid: int) -> bool:
    return _progress(bus, domid, devid)[1] == hotplug.CONNECTED


def _progress(bus: Bus, domid: int, devid: int) -> tuple[str | None, str | None]:
    """A backend's state and hotplug status. DeviceError when it will get no further."""
    path = backend_path(domid, devid)
    paths = [f"{path}/{key}" for key in ("state", hotplug.STATUS, hotplug.ERROR_TEXT)]
    state, status, why, text = bus.read_many([*paths, backend.error_path(domid, KIND, devid)])
    if status == hotplug.ERROR:
        raise DeviceError(f"vif {devid}: {why or 'xendevd could not plug it'}")
    said = _behind(text)
    if state in {CLOSING, CLOSED} or (said and not backend.driven(domid, KIND, devid)):
        raise DeviceError(f"vif {devid}: netback refused it{said}", hint="dmesg may say more")
    return state, status


def _unplugged(bus: Bus, domid: int, devids: Iterable[int]) -> bool:
    paths = [f"{backend_path(domid, devid)}/{hotplug.STATUS}" for devid in devids]
    return any(status != hotplug.CONNECTED for status in bus.read_many(paths))


def _netback_error(bus: Bus, domid: int, devid: int) -> str:
    """What netback wrote about a vif that failed (xenbus_va_dev_error), with ": " in front."""
    return _behind(bus.get(backend.error_path(domid, KIND, devid)))


def _behind(text: str | None) -> str:
    return f": {' '.join(text.split())}" if text else ""


def _forwards(domid: int, config: VifConfig) -> bool:
    """Whether a plugged vif's bridge passes packets on to it.

    The bridge opens the port when a worker of the kernel has noticed the carrier that netback
    switched on (net/core/link_watch.c); what is sent before that is dropped.
    """
    try:
        with open(f"{_link(domid, config)}/brport/state", encoding="ascii") as file:
            return file.read().strip() != BRIDGE_PORT_DISABLED
    except OSError:
        return True  # no port of a Linux bridge


def _link(domid: int, config: VifConfig) -> str:
    return f"/sys/class/net/{config.vifname or f'vif{domid}.{config.devid}'}"


def _mtu(domid: int, config: VifConfig) -> int:
    """The MTU of a plugged vif: the configured one, or what xendevd took from the bridge."""
    try:
        with open(f"{_link(domid, config)}/mtu", encoding="ascii") as file:
            return int(file.read())
    except OSError:
        return config.mtu or MTU


def disconnect_all(bus: Bus, domid: int) -> None:
    """``disconnect`` for whatever vifs the bus knows of a domain."""
    if devids := backend.known(bus, domid, KIND):
        disconnect(bus, domid, devids)


def disconnect(bus: Bus, domid: int, devids: Sequence[int]) -> None:
    """Have netback let go of vifs, and remove their nodes; missing ones are fine.

    netback unmaps the rings, ends its threads and removes the interface before its device goes
    (netback_remove). Raises DeviceError as chaos.backend.close does.
    """
    backend.close(bus, domid, KIND, devids)


def taken_macs(bus: Bus, ours: Container[int] = frozenset()) -> set[str]:
    """MAC addresses on this host that no record of ours tells of.

    Dom0's own interfaces, and the vifs of other toolstacks, which exist only beside xenstored: of
    all domains there but ``ours``.
    """
    taken = set()
    for name in os.listdir("/sys/class/net"):
        if not name.startswith("vif"):
            with open(f"/sys/class/net/{name}/address", encoding="ascii") as file:
                taken.add(file.read().strip())
    base = f"/local/domain/{DOM0}/backend/vif"
    if "xenstored" in bus.path:
        paths = [
            f"{base}/{domid}/{devid}/mac"
            for domid in bus.children(base) or ()
            if int(domid) not in ours
            for devid in bus.children(f"{base}/{domid}") or ()  # it may go meanwhile
        ]
        taken |= {mac.lower() for mac in bus.read_many(paths) if mac}
    return taken
