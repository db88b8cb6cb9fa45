"""One virtual interface as in ``vif=`` of xl.cfg(5).  Pure.

The keys are those of xl-network-configuration(5), read as xl does (tools/xl/xl_parse.c,
parse_nic_config; the rate as tools/libs/util/libxlu_vif.c), and three of our own: ``ip`` holds an
address with a prefix, of either family or both; ``gateway`` the same without a prefix.
Where xl only warns (an unknown key) or takes what cannot work (a multicast MAC), this raises.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Address,
    IPv6Interface,
    ip_address,
    ip_interface,
)
from typing import TYPE_CHECKING, Any

from chaos.netspec import RateLimit, VlanConfig, check_mac, parse_mac, parse_rate, parse_vlan
from chaos.xldoc import quote
from xenctypes.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_TEXT = 4096  # characters of one vif
MAX_DEVID = 255
MTU_MIN = 68  # ETH_MIN_MTU, linux/if_ether.h
MTU_MAX = 65517  # drivers/net/xen-netback/interface.c: ETH_MAX_MTU - VLAN_ETH_HLEN
NAME_MAX = 15  # IFNAMSIZ - 1, linux/if.h
OVS_VLAN_MAX = 4095  # of a port's tag and trunks, ovs-vswitchd.conf.db(5)

_OVS_BRIDGE = re.compile(r"([^.:]+)(?:\.([0-9]{1,4}))?((?::[0-9]{1,4})*)", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class VifConfig:
    """A virtual interface; construction checks the values and raises ConfigError.

    ``devid``      its number, the N of vifDOMID.N, 0 to MAX_DEVID
    ``mac``        6 bytes, or None to have one made up in 00:16:3e
    ``bridge``     the bridge to join; one of Open vSwitch may be BRIDGE[.TAG][:TRUNK...]
    ``ipv4`` ``ipv6``  the guest's addresses with their prefixes, or None
    ``gateway4`` ``gateway6``  its default routers, or None
    ``mtu``        bytes, or 0 to follow the bridge
    ``rate``       limit of what the guest sends, or None
    ``vlan``       VLANs on a bridge that filters them, or None
    ``vifname``    name of the backend interface in Dom0, or "" for vifDOMID.N
    ``script``     hotplug script as given, or "" for plain bridging
    ``gatewaydev`` interface for a script that routes, or ""
    ``backend``    domain that serves the vif, name or number, or "" for Dom0
    ``type``       "vif", "ioemu", or "" for what the domain's type has
    ``model``      device to emulate, for "ioemu" only, or ""
    ``trusted``    whether the guest is told to trust its backend
    """

    devid: int = 0
    mac: bytes | None = None
    bridge: str = "xenbr0"
    ipv4: IPv4Interface | None = None
    ipv6: IPv6Interface | None = None
    gateway4: IPv4Address | None = None
    gateway6: IPv6Address | None = None
    mtu: int = 0
    rate: RateLimit | None = None
    vlan: VlanConfig | None = None
    vifname: str = ""
    script: str = ""
    gatewaydev: str = ""
    backend: str = ""
    type: str = ""
    model: str = ""
    trusted: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.devid <= MAX_DEVID:
            raise ConfigError(f"devid {self.devid} is not within 0 to {MAX_DEVID}", key="devid")
        if self.mac is not None:
            check_mac(self.mac)
        self._check_bridge()
        for key in ("vifname", "gatewaydev"):
            if getattr(self, key):
                _check_interface(getattr(self, key), key)
        if self.mtu and not MTU_MIN <= self.mtu <= MTU_MAX:
            raise ConfigError(f"mtu {self.mtu} is not within {MTU_MIN} to {MTU_MAX}", key="mtu")
        if self.type not in {"", "vif", "ioemu"}:
            raise ConfigError(f'type {quote(self.type)} is neither "vif" nor "ioemu"', key="type")
        _check_address(self.ipv4)
        _check_address(self.ipv6)
        _check_gateway(self.gateway4, self.ipv4)
        _check_gateway(self.gateway6, self.ipv6)
        for key in ("script", "backend", "model"):
            if not getattr(self, key).isprintable():
                raise ConfigError(f"{key} has characters that do not print", key=key)

    def _check_bridge(self) -> None:
        match = _OVS_BRIDGE.fullmatch(self.bridge)
        if match is None or not self.openvswitch:
            _check_interface(self.bridge, "bridge")
            return
        _check_interface(match[1], "bridge")
        ids = [int(vlan) for vlan in (match[2], *match[3].split(":")) if vlan]
        if max(ids, default=0) > OVS_VLAN_MAX:
            cause = f"bridge {quote(self.bridge)}: a VLAN above {OVS_VLAN_MAX}"
            raise ConfigError(cause, key="bridge")
        if ids and self.vlan is not None:
            cause = f"both bridge {quote(self.bridge)} and vlan name VLANs"
            raise ConfigError(cause, hint="leave one of them out", key="vlan")

    @property
    def openvswitch(self) -> bool:
        """Whether only an Open vSwitch bridge will do: the script or the bridge says so.

        Without either, NAME.TAG is a Linux bridge where there is one of that name.
        """
        script = self.script.rpartition("/")[2]
        if script == "vif-openvswitch":
            return True
        insists = ":" in self.bridge or len(self.bridge) > NAME_MAX
        return insists and script != "vif-bridge" and bool(_OVS_BRIDGE.fullmatch(self.bridge))

    @property
    def mac_text(self) -> str:
        """The MAC as 00:16:3e:01:02:03, or ""."""
        return self.mac.hex(":") if self.mac is not None else ""

    @property
    def ip(self) -> str:
        """The addresses as in the configuration, for hotplug scripts."""
        return " ".join(str(ip) for ip in (self.ipv4, self.ipv6) if ip is not None)

    @property
    def gateway(self) -> str:
        """The routers as in the configuration."""
        return " ".join(str(ip) for ip in (self.gateway4, self.gateway6) if ip is not None)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON, under the names of the keys."""
        return {
            "devid": self.devid,
            "mac": self.mac_text,
            "bridge": self.bridge,
            "ip": self.ip,
            "gateway": self.gateway,
            "mtu": self.mtu,
            "rate": None if self.rate is None else asdict(self.rate),
            "vlan": None if self.vlan is None else asdict(self.vlan),
            "vifname": self.vifname,
            "script": self.script,
            "gatewaydev": self.gatewaydev,
            "backend": self.backend,
            "type": self.type,
            "model": self.model,
            "trusted": self.trusted,
        }


def parse_vif(text: str, devid: int = 0) -> tuple[VifConfig, list[str]]:
    """Read one vif; ``devid`` is its number unless it names one.  Also return warnings.

    Raise ConfigError; its ``column`` is the position in the text, from 1.
    """
    if len(text) > MAX_TEXT:
        raise ConfigError(f"a vif is longer than {MAX_TEXT} characters")
    values: dict[str, Any] = {"devid": devid}
    places: dict[str, int] = {}
    warnings: list[str] = []
    position = 0
    for part in text.split(","):
        word = part.lstrip(" ")
        column = position + len(part) - len(word) + 1
        position += len(part) + 1
        if not word:
            continue
        key, equals, value = word.partition("=")
        if equals and (key.startswith("colo_") or key in _IGNORED):
            warnings.append(f"vif: {key} is {_IGNORED.get(key, 'for COLO only')}, ignored")
            continue
        if key == "netdev":
            warnings.append("vif: netdev is deprecated, use gatewaydev")
            key = "gatewaydev"
        try:
            values.update(_read(key, value if equals else None))
        except ConfigError as error:
            raise _at(error, column) from None
        places[key] = column
    try:
        return VifConfig(**values), warnings
    except ConfigError as error:
        raise _at(error, places.get(error.key, 1)) from None


def _at(error: ConfigError, column: int) -> ConfigError:
    return ConfigError(error.cause, hint=error.hint, key=error.key, column=column)


def _read(key: str, value: str | None) -> dict[str, Any]:
    """The fields that one word of a vif sets; a flag has no value."""
    if value is None and key in {"trusted", "untrusted"}:
        return {"trusted": key == "trusted"}
    reader = _READERS.get(key)
    if reader is None or value is None:
        known = [f"{name}=" for name in _READERS] + ["trusted", "untrusted"]
        near = get_close_matches(key[:32] if value is None else f"{key[:32]}=", known, 1)
        hint = f"did you mean {near[0]}?" if near else ""
        word = key if value is None else f"{key}="
        raise ConfigError(f"{quote(word)} is no key of a vif", hint=hint, key=key)
    return reader(value)


def read_ip(text: str) -> dict[str, Any]:
    """The fields for addresses with prefixes, one of each family at most, between blanks."""
    found: dict[str, Any] = {}
    for word in text.split():
        try:
            address = ip_interface(word)
        except ValueError:
            hint = "for example 10.77.0.2/24 or fd00::2/64"
            raise ConfigError(f"{quote(word)} is no IP address", hint=hint, key="ip") from None
        if f"ipv{address.version}" in found:
            raise ConfigError(f"more than one IPv{address.version} address", key="ip")
        found[f"ipv{address.version}"] = address
    return found


def read_gateway(text: str) -> dict[str, Any]:
    """The fields for routers, one of each family at most, between blanks."""
    found: dict[str, Any] = {}
    for word in text.split():
        try:
            address = ip_address(word)
        except ValueError:
            cause = f"{quote(word)} is no IP address of a gateway"
            raise ConfigError(cause, hint="no prefix here", key="gateway") from None
        if f"gateway{address.version}" in found:
            raise ConfigError(f"more than one IPv{address.version} gateway", key="gateway")
        found[f"gateway{address.version}"] = address
    return found


def _number(key: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise ConfigError(f"{key} {quote(text)} is not a number", key=key)
    return int(text)


def _check_interface(name: str, key: str) -> None:
    """What dev_valid_name of the Linux kernel (net/core/dev.c) takes, ASCII without spaces."""
    bad = name in {".", ".."} or any(c in "/:" or not "!" <= c <= "~" for c in name)
    if bad or not 0 < len(name) <= NAME_MAX:
        hint = f"1 to {NAME_MAX} letters, without / and :"
        raise ConfigError(f"{key} {quote(name)} is no name of an interface", hint=hint, key=key)


def _check_address(address: IPv4Interface | IPv6Interface | None) -> None:
    if address is None:
        return
    ip, network = address.ip, address.network
    scoped = isinstance(address, IPv6Interface) and address.scope_id is not None
    if ip.is_multicast or ip.is_unspecified or ip.is_loopback or scoped:
        raise ConfigError(f"{ip} is no address of one interface", key="ip")
    ends = {network.network_address, network.broadcast_address}
    if ip.version == 4 and network.prefixlen < 31 and ip in ends:
        raise ConfigError(f"{ip} is not a host's address in {network}", key="ip")


def _check_gateway(
    gateway: IPv4Address | IPv6Address | None, address: IPv4Interface | IPv6Interface | None
) -> None:
    if gateway is None:
        return
    if address is None:
        cause = f"gateway {gateway} without an IPv{gateway.version} address"
        raise ConfigError(cause, hint="give ip=", key="gateway")
    if gateway == address.ip:
        raise ConfigError(f"gateway {gateway} is the guest's own address", key="gateway")
    on_link = gateway in address.network or (gateway.version == 6 and gateway.is_link_local)
    if not on_link:
        raise ConfigError(f"gateway {gateway} is not in {address.network}", key="gateway")


def _text(key: str) -> Callable[[str], dict[str, Any]]:
    return lambda value: {key: value}


_READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "type": _text("type"),
    "mac": lambda value: {"mac": parse_mac(value)},
    "bridge": _text("bridge"),
    "gatewaydev": _text("gatewaydev"),
    "ip": read_ip,
    "gateway": read_gateway,
    "script": _text("script"),
    "backend": _text("backend"),
    "vifname": _text("vifname"),
    "model": _text("model"),
    "rate": lambda value: {"rate": parse_rate(value)},
    "devid": lambda value: {"devid": _number("devid", value)},
    "mtu": lambda value: {"mtu": _number("mtu", value)},
    "vlan": lambda value: {"vlan": parse_vlan(value)},
}
_IGNORED = {"forwarddev": "for COLO only", "accel": "not supported by xl either"}
