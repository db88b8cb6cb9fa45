"""What is to be done with a vif: backend nodes in, a VifPlan out. Pure.

The nodes are those that libxl writes (tools/libs/light/libxl_nic.c) and that
Xen's own scripts read (tools/hotplug/Linux/vif-bridge, vif-openvswitch):

===========  =====================================================================
script       whose business the vif is, see ``served``
bridge       a Linux bridge or an Open vSwitch bridge; for the latter also
             ``name.TAG``, ``name:TRUNK:TRUNK`` and ``name.TAG:TRUNK...``
vifname      the interface's new name
mtu          bytes; without it the bridge's
vlan         VLANs of the port, xl-network-configuration(5)
frontend     where the guest's nodes are
mac          the guest's address, for Open vSwitch's records
===========  =====================================================================

``rate`` is netback's own key: it limits what the guest sends by itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from noxs.hotplug import DeviceError

KEYS = ("script", "bridge", "vifname", "mtu", "vlan", "frontend", "mac")

IFNAME_MAX = 15  # IFNAMSIZ - 1 of linux/if.h, in bytes
MTU_MIN, MTU_MAX = 68, 65535 - 18  # ETH_MIN_MTU; ETH_MAX_MTU - VLAN_ETH_HLEN of netback
ERROR_MAX = 900  # bytes of hotplug-error; a XenStore value may have 2048 with everything
VLAN_MAX = 4094

OURS = {"vif-xendevd": None, "true": None, "vif-xendevd-bridge": False}
OURS |= {"vif-xendevd-openvswitch": True}
"""Scripts that do nothing themselves: these vifs are xendevd's. The value is ``openvswitch``."""

BUILT_IN = {"": None, "vif-bridge": False, "vif-openvswitch": True}
"""Scripts whose work xendevd does where nobody else would run them."""

_BRIDGE = re.compile(r"([^.:]+)(?:\.([0-9]+))?(?::([0-9]+(?::[0-9]+)*))?")
_VLAN = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4})|\+([0-9]{1,4})x([0-9]{1,4}))?([pu]?)")


@dataclass(frozen=True, slots=True)
class Vlans:
    """The VLANs of a switch port. ``pvid`` is where untagged frames of the guest belong.

    Frames of the ``untagged`` reach the guest without a tag, those of ``tagged``
    with one.
    """

    pvid: int | None
    untagged: frozenset[int] = frozenset()
    tagged: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class VifPlan:
    """How to plug one vif.

    ``path`` is its backend node, ``vif`` the interface as netback named it,
    ``ifname`` as it shall be named. ``mtu`` is in bytes, None for the bridge's.
    ``openvswitch`` is True if only an Open vSwitch bridge will do, None if the host
    says what ``bridge`` is, False if only a Linux bridge will; ``ovs_bridge`` and
    ``ovs_vlans`` are how ``bridge`` reads to Open vSwitch.
    """

    path: str
    vif: str
    ifname: str
    bridge: str
    mtu: int | None = None
    vlans: Vlans | None = None
    openvswitch: bool | None = None
    ovs_bridge: str = ""
    ovs_vlans: Vlans | None = None
    frontend: str = ""
    mac: str = ""


def served(script: str, *, alone: bool) -> bool:
    """Whether a vif with this ``script`` is xendevd's to plug.

    libxl runs the script whatever xl.conf says, so on its hosts only a script that
    does nothing leaves the vif to us. ``alone`` is True where no libxl is.
    """
    return alone or script.rpartition("/")[2] in OURS


def parse(path: str, vif: str, nodes: Mapping[str, str]) -> VifPlan:
    """Read the backend nodes of ``vif`` (the keys of KEYS; absent or "" is not given).

    DeviceError says which node is wrong.
    """
    script = nodes.get("script", "").rpartition("/")[2]
    modes = OURS | BUILT_IN
    if script not in modes:
        raise DeviceError(
            f"script {script!r}: xendevd runs no scripts",
            hint="vif-bridge and vif-openvswitch are built in",
        )
    ifname = nodes.get("vifname") or vif
    check_ifname("vifname", ifname)
    bridge = nodes.get("bridge", "")
    if not bridge:
        raise DeviceError("no bridge is given")
    openvswitch = modes[script]
    ovs_bridge, ovs_vlans = ("", None) if openvswitch is False else _ovs_port(bridge)
    if openvswitch is None and (":" in bridge or (ovs_vlans and len(bridge) > IFNAME_MAX)):
        openvswitch = True
    if not openvswitch:
        check_ifname("bridge", bridge)
    elif not ovs_bridge:
        raise DeviceError(f"bridge {bridge!r} is not of the form NAME[.TAG][:TRUNK[:TRUNK...]]")
    vlans = parse_vlans(nodes["vlan"]) if nodes.get("vlan") else None
    if vlans and ovs_vlans:
        if openvswitch:
            raise DeviceError(f"both bridge {bridge!r} and vlan {nodes['vlan']!r} name VLANs")
        ovs_bridge, ovs_vlans = "", None  # it can only be a Linux bridge with a dot in its name
    return VifPlan(
        path=path,
        vif=vif,
        ifname=ifname,
        bridge=bridge,
        mtu=_mtu(nodes.get("mtu", "")),
        vlans=vlans,
        openvswitch=openvswitch,
        ovs_bridge=ovs_bridge,
        ovs_vlans=vlans or ovs_vlans,
        frontend=nodes.get("frontend", ""),
        mac=nodes.get("mac", ""),
    )


def check_ifname(what: str, name: str) -> None:
    """DeviceError unless the kernel takes the name for an interface (dev_valid_name)."""
    try:
        encoded = name.encode("ascii")
    except UnicodeEncodeError:
        encoded = b""
    # "%" is no part of a name but a pattern to the kernel: it would pick a number.
    bad = not encoded.isascii() or re.search(rb"[\s/:%\x00-\x20\x7f]", encoded)
    if not encoded or len(encoded) > IFNAME_MAX or bad or name in {".", ".."}:
        raise DeviceError(f"{what} {name!r} is no name for a network interface")


def parse_vlans(text: str) -> Vlans:
    """Read a ``vlan`` value: terms with "/" between, as in xl-network-configuration(5).

    A term is ``V``, ``A-B`` or ``V+STEPxCOUNT`` (V and COUNT more), then perhaps
    ``u`` for untagged or, after a single V, ``p`` for the PVID, which is untagged
    too. A lone V is the PVID.
    """
    pvid: int | None = None
    untagged: set[int] = set()
    tagged: set[int] = set()
    for term in text.split("/"):
        match = _VLAN.fullmatch(term)
        if match is None:
            raise DeviceError(f"vlan {text!r}: {term!r} is no VLAN, range or series of VLANs")
        first, last, step, count, flag = match.groups()
        if last:
            ids = range(int(first), int(last) + 1)
        elif step:
            ids = range(int(first), int(first) + int(step) * int(count) + 1, int(step) or 1)
        else:
            ids = range(int(first), int(first) + 1)
        if not ids or not 1 <= ids[0] <= ids[-1] <= VLAN_MAX:
            raise DeviceError(f"vlan {text!r}: {term!r} is not within 1 to {VLAN_MAX}")
        if flag == "p" or text == first:
            if len(ids) > 1 or pvid is not None:
                raise DeviceError(f"vlan {text!r}: only one VLAN can be the PVID")
            pvid = ids[0]
            flag = "u"
        (untagged if flag == "u" else tagged).update(ids)
    if pvid is None:
        raise DeviceError(f"vlan {text!r}: one VLAN must be the PVID", hint="mark it with p")
    return Vlans(pvid, frozenset(untagged), frozenset(tagged - untagged))


def _ovs_port(bridge: str) -> tuple[str, Vlans | None]:
    """The bridge and the VLANs in vif-openvswitch's form of a bridge name; "" if it is not one."""
    match = _BRIDGE.fullmatch(bridge)
    if match is None:
        return "", None
    name, tag, trunks = match.groups()
    ids = [int(part) for part in (tag, *(trunks or "").split(":")) if part]
    if max(ids, default=0) > VLAN_MAX + 1:
        raise DeviceError(f"bridge {bridge!r}: VLANs are within 0 to {VLAN_MAX + 1}")
    if not ids:
        return name, None
    pvid = ids[0] if tag else None
    untagged = frozenset({pvid}) if pvid is not None else frozenset()
    return name, Vlans(pvid, untagged, frozenset(ids[1:] if tag else ids))


def _mtu(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or not MTU_MIN <= int(text[:9]) <= MTU_MAX:
        raise DeviceError(f"mtu {text!r} is not within {MTU_MIN} to {MTU_MAX} bytes")
    return int(text)


def error_text(error: BaseException) -> str:
    """What goes to hotplug-error: one line, bounded, printable."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.encode("ascii", "backslashreplace")[:ERROR_MAX].decode()
