"""MAC addresses, rates and VLANs as in ``vif=`` of xl.cfg(5).  Pure.

The syntax is that of xl-network-configuration(5); rates are read as by libxlutil (Xen's
tools/libs/util/libxlu_vif.c), which tests/unit/test_netspec.py holds this against.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from chaos.xldoc import quote
from xenctypes.errors import ConfigError

VLAN_MAX = 4094  # IEEE 802.1Q; 0 and 4095 are reserved

_MAC = re.compile(r"[0-9a-fA-F]{1,2}(?::[0-9a-fA-F]{1,2}){5}")
_RATE = re.compile(r"([0-9]{1,24})([GMK]?)([Bb])/s")
_INTERVAL = re.compile(r"([0-9]{1,24})([mu]?)s?")
_VLAN = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4})|\+([0-9]{1,4})x([0-9]{1,4}))?([pu]?)")


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Credit for what the guest sends: so many bytes every so many microseconds.

    The two numbers of the backend's ``rate`` node (xen/include/public/io/netif.h).
    """

    bytes_per_interval: int
    interval_usecs: int = 50_000

    def __post_init__(self) -> None:
        if not 0 < self.bytes_per_interval < 1 << 64 or not 0 < self.interval_usecs < 1 << 32:
            raise ConfigError("the rate is less than one byte per interval", key="rate")

    def __str__(self) -> str:
        return f"{self.bytes_per_interval},{self.interval_usecs}"


@dataclass(frozen=True, slots=True)
class VlanConfig:
    """VLANs of a vif: ``pvid`` for what arrives untagged, and those it may use, ascending.

    ``untagged`` (it has the pvid in it) leave without a tag, ``tagged`` with one.
    """

    pvid: int
    untagged: tuple[int, ...]
    tagged: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        both = self.untagged + self.tagged
        in_order = all(list(ids) == sorted(ids) for ids in (self.untagged, self.tagged))
        if not in_order or len(set(both)) != len(both) or self.pvid not in self.untagged:
            raise ConfigError("the VLANs are unsorted, repeated or without their PVID", key="vlan")
        if not 1 <= min(both) <= max(both) <= VLAN_MAX:
            raise ConfigError(f"VLANs are within 1 to {VLAN_MAX}", key="vlan")

    def __str__(self) -> str:
        """In xl's notation, for the backend's ``vlan`` node; ``parse_vlan`` reads it back."""
        untagged = (f"/{vlan}u" for vlan in self.untagged if vlan != self.pvid)
        tagged = (f"/{vlan}" for vlan in self.tagged)
        return "".join((f"{self.pvid}p", *untagged, *tagged))


def parse_mac(text: str) -> bytes:
    """Read six groups of one or two hexadecimal digits between colons."""
    if _MAC.fullmatch(text) is None:
        hint = "for example 00:16:3e:01:02:03"
        raise ConfigError(f"{quote(text)} is no MAC address", hint=hint, key="mac")
    return bytes(int(group, 16) for group in text.split(":"))


def check_mac(mac: bytes) -> None:
    """Raise ConfigError unless the bytes are the address of one interface."""
    if len(mac) != 6:
        raise ConfigError(f"a MAC address has 6 bytes, not {len(mac)}", key="mac")
    if mac[0] & 1 or not any(mac):
        cause = f"{mac.hex(':')} is no address of one interface"
        raise ConfigError(cause, hint="clear the lowest bit of its first byte", key="mac")


def parse_rate(text: str) -> RateLimit:
    """Read RATE[@INTERVAL], such as 10Mb/s or 250KB/s@20ms (xlu_vif_parse_rate).

    Numbers are in C notation: 010KB/s is 8 KB/s.  In 08KB/s, strtoull stops at the 8, and
    xlu_vif_parse_rate reads on from there; that is an error here.
    """
    rate, at, interval = text.partition("@")
    match = _RATE.fullmatch(rate)
    if match is None:
        hint = "for example 10Mb/s or 250KB/s@20ms"
        raise ConfigError(f"{quote(text)} is no rate", hint=hint, key="rate")
    amount = _rate_number(match[1], text) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2]]
    if match[3] == "b":
        amount //= 8
    usecs = 50_000
    if at:
        match = _INTERVAL.fullmatch(interval)
        if match is None:
            hint = "for example @20ms"
            raise ConfigError(f"{quote(interval)} is no interval", hint=hint, key="rate")
        unit = {"u": 1, "m": 10**3, "": 10**6}[match[2]]
        usecs = _rate_number(match[1], text) * unit
    if usecs >= 1 << 32 or amount * usecs >= 1 << 64:
        raise ConfigError(f"{quote(text)} is out of range", key="rate")
    return RateLimit(amount * usecs // 10**6, usecs)


def _rate_number(digits: str, text: str) -> int:
    """A number in C notation, from 1 to UINT32_MAX."""
    octal = digits[0] == "0"
    if not octal or all(digit < "8" for digit in digits):
        number = int(digits, 8 if octal else 10)
        if 0 < number < 1 << 32:
            return number
    raise ConfigError(f"{quote(text)} is out of range", key="rate")


def parse_vlan(text: str) -> VlanConfig:
    """Read VLAN terms between slashes: 10p/20/100-110u/200+10x4.

    The last is 200 and four more, 10 apart, as xl-network-configuration(5) says (its example has
    one more).
    """
    untagged: set[int] = set()
    tagged: set[int] = set()
    pvids: list[int] = []
    terms = text.split("/")
    for term in terms:
        ids, mark = _vlan_term(term)
        if len(terms) == len(ids) == 1:
            mark = mark or "p"
        if mark == "p":
            pvids.extend(ids)
        (untagged if mark else tagged).update(ids)
    if len(pvids) != 1:
        cause = f"{len(pvids)} VLANs are marked as the PVID, not 1"
        raise ConfigError(cause, hint="mark it with p, as in 10p/20", key="vlan")
    return VlanConfig(pvids[0], tuple(sorted(untagged)), tuple(sorted(tagged - untagged)))


def _vlan_term(term: str) -> tuple[range, str]:
    """The VLANs of one term and its mark: "p", "u" or ""."""
    match = _VLAN.fullmatch(term)
    if match is None:
        raise ConfigError(f"{quote(term)} is no VLAN or range", hint="as in 10p/20", key="vlan")
    first, step = int(match[1]), int(match[3] or 1)
    last = int(match[2] or first) if match[4] is None else first + step * int(match[4])
    if not 1 <= first <= last <= VLAN_MAX or step < 1:
        raise ConfigError(f"{quote(term)} is not within 1 to {VLAN_MAX}", key="vlan")
    return range(first, last + 1, step), match[5]
