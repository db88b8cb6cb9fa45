"""As much of rtnetlink as plugging a vif takes: look at a link, change it, set its VLANs.

A plug is one look and two changes (bench/plug.py says what that saves against
pyroute2). The layouts are in linux/netlink.h, linux/rtnetlink.h, linux/if_link.h
and linux/if_bridge.h; what one message does in which order is do_setlink in
net/core/rtnetlink.c. It brings a link up before it sets the address mode.
"""

import os
import socket
from collections.abc import Iterable, Iterator
from errno import EAFNOSUPPORT, ENODEV
from struct import Struct
from typing import NamedTuple

HEADER = Struct("=IHHII")  # nlmsghdr: len, type, flags, seq, pid
IFINFO = Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
ATTR = Struct("=HH")  # nlattr: len, type
VLAN = Struct("=HH")  # bridge_vlan_info: flags, vid
U32 = Struct("=I")
I32 = Struct("=i")

NLMSG_ERROR = 2
NLM_F_REQUEST, NLM_F_ACK = 1, 4
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLMSGERR_ATTR_MSG = 1
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK = 270, 10, 11
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO = 3, 4, 10, 18
IFLA_AF_SPEC, IFLA_EXT_MASK = 26, 29
IFLA_INFO_KIND, IFLA_INFO_DATA = 1, 2
IFLA_BR_VLAN_FILTERING = 7
IFLA_INET6_ADDR_GEN_MODE = 8
IFLA_BRIDGE_VLAN_INFO = 2
IN6_ADDR_GEN_MODE_NONE = 1
RTEXT_FILTER_SKIP_STATS = 8
IFF_UP = 1
VLAN_INFO_PVID, VLAN_INFO_UNTAGGED = 2, 4

REPLY_MAX = 1 << 16


class Link(NamedTuple):
    """An interface: ``mtu`` in bytes, ``master`` an index or 0, ``kind`` as in ``ip -d link``."""

    ifindex: int
    name: str
    mtu: int
    up: bool
    master: int = 0
    kind: str = ""
    vlan_filtering: bool = False


def attribute(kind: int, data: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    size = ATTR.size + len(data)
    return ATTR.pack(size, kind) + data + bytes(-size % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, data) of each attribute, up to the first that is malformed."""
    at = 0
    while at + ATTR.size <= len(data):
        size, kind = ATTR.unpack_from(data, at)
        if size < ATTR.size or at + size > len(data):
            return
        yield kind & NLA_TYPE_MASK, data[at + ATTR.size : at + size]
        at += size + 3 & ~3


def message(kind: int, seq: int, info: bytes, *parts: bytes) -> bytes:
    """A request that wants an acknowledgement."""
    body = info + b"".join(parts)
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | NLM_F_ACK, seq, 0) + body


def changes(
    *, name: str = "", mtu: int = 0, master: int = 0, quiet: bool = False
) -> Iterator[bytes]:
    """The attributes of a change; what is empty or zero stays.

    ``quiet`` keeps the kernel from giving the interface a link-local IPv6 address,
    and so from sending anything by itself.
    """
    if mtu:
        yield attribute(IFLA_MTU, U32.pack(mtu))
    if name:
        yield attribute(IFLA_IFNAME, name.encode() + b"\0")
    if quiet:
        mode = attribute(IFLA_INET6_ADDR_GEN_MODE, bytes([IN6_ADDR_GEN_MODE_NONE]))
        family = attribute(socket.AF_INET6 | NLA_F_NESTED, mode)
        yield attribute(IFLA_AF_SPEC | NLA_F_NESTED, family)
    if master:
        yield attribute(IFLA_MASTER, U32.pack(master))


def parse_link(payload: bytes) -> Link:
    """An RTM_NEWLINK message without its header."""
    _, _, index, flags, _ = IFINFO.unpack_from(payload)
    name, mtu, master, kind, filtering = "", 0, 0, "", False
    for attr, data in attributes(payload[IFINFO.size :]):
        if attr == IFLA_IFNAME:
            name = data.rstrip(b"\0").decode()
        elif attr == IFLA_MTU:
            (mtu,) = U32.unpack(data)
        elif attr == IFLA_MASTER:
            (master,) = U32.unpack(data)
        elif attr == IFLA_LINKINFO:
            info = dict(attributes(data))
            kind = info.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode()
            if kind == "bridge":
                bridge = dict(attributes(info.get(IFLA_INFO_DATA, b"")))
                filtering = bridge.get(IFLA_BR_VLAN_FILTERING, b"\0") != b"\0"
    return Link(index, name, mtu, bool(flags & IFF_UP), master, kind, filtering)


class Rtnetlink:
    """A socket to the kernel's rtnetlink. Every failure is an OSError.

    Its ``errno`` is the kernel's, ``strerror`` the kernel's own words where it has some.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._seq = 0
        self._ipv6 = True

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def link(self, name: str) -> Link | None:
        """The interface of that name, or None."""
        payload = self._call(
            RTM_GETLINK,
            IFINFO.pack(0, 0, 0, 0, 0),
            attribute(IFLA_IFNAME, name.encode() + b"\0"),
            attribute(IFLA_EXT_MASK, U32.pack(RTEXT_FILTER_SKIP_STATS)),
            missing=ENODEV,
        )
        return parse_link(payload) if payload else None

    def set_link(self, index: int, *, name: str = "", mtu: int = 0, master: int = 0) -> None:
        """Rename, resize and enslave an interface in one message, and keep IPv6 quiet on it.

        After a failure any of it may have been done.
        """
        info = IFINFO.pack(0, 0, index, 0, 0)
        try:
            parts = changes(name=name, mtu=mtu, master=master, quiet=self._ipv6)
            self._call(RTM_SETLINK, info, *parts)
        except OSError as error:
            if error.errno != EAFNOSUPPORT or not self._ipv6:
                raise
            self._ipv6 = False  # this kernel has no IPv6
            parts = changes(name=name, mtu=mtu, master=master)
            self._call(RTM_SETLINK, info, *parts)

    def set_up(self, index: int) -> None:
        """Bring an interface up."""
        self._call(RTM_SETLINK, IFINFO.pack(0, 0, index, IFF_UP, IFF_UP))

    def add_vlans(self, index: int, vlans: Iterable[tuple[int, int]]) -> None:
        """Give a bridge port VLANs: pairs of an id and VLAN_INFO_* flags."""
        self._vlans(RTM_SETLINK, index, vlans)

    def delete_vlans(self, index: int, vlans: Iterable[int]) -> None:
        """Take VLANs from a bridge port; those that it does not have are no error."""
        self._vlans(RTM_DELLINK, index, ((vlan, 0) for vlan in vlans))

    def _vlans(self, kind: int, index: int, vlans: Iterable[tuple[int, int]]) -> None:
        entries = b"".join(
            attribute(IFLA_BRIDGE_VLAN_INFO, VLAN.pack(flags, vlan)) for vlan, flags in vlans
        )
        info = IFINFO.pack(socket.AF_BRIDGE, 0, index, 0, 0)
        self._call(kind, info, attribute(IFLA_AF_SPEC | NLA_F_NESTED, entries))

    def _call(self, kind: int, info: bytes, *parts: bytes, missing: int = 0) -> bytes:
        """Send one request; the payload of the answer, b"" for none or the error ``missing``."""
        self._seq = self._seq + 1 & 0xFFFFFFFF
        self._socket.send(message(kind, self._seq, info, *parts))
        payload = b""
        while True:
            data = self._socket.recv(REPLY_MAX)
            at = 0
            while at + HEADER.size <= len(data):
                size, answer, flags, seq, _ = HEADER.unpack_from(data, at)
                size = max(size, HEADER.size)
                body = data[at + HEADER.size : at + size]
                at += size + 3 & ~3
                if seq != self._seq:
                    continue  # what is left of a request that was interrupted
                if answer != NLMSG_ERROR:
                    payload = body
                    continue
                error = -I32.unpack_from(body)[0]
                if error in {0, missing}:
                    return payload
                raise OSError(error, _words(body, flags) or os.strerror(error))


def _words(body: bytes, flags: int) -> str:
    """The kernel's message in a refusal (NLMSGERR_ATTR_MSG), or ""."""
    if not flags & NLM_F_ACK_TLVS:
        return ""
    size = HEADER.unpack_from(body, 4)[0]
    at = 4 + (HEADER.size if flags & NLM_F_CAPPED else size + 3 & ~3)
    text = dict(attributes(body[at:])).get(NLMSGERR_ATTR_MSG, b"")
    return text.rstrip(b"\0").decode(errors="replace")
