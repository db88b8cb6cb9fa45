"""Files opened with the rights of whoever asked, not with the daemon's.

Linux keeps credentials for each thread: setfsuid(2) and setfsgid(2) change what this thread may
open and nothing else, and setgroups by the raw call likewise. While they are changed the thread
must not do anything for anybody else; no ``await`` comes in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from socket import SO_PEERCRED, SOL_SOCKET
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple

from xenctypes.errors import PermissionDenied, UsageError

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping

CREDENTIALS = Struct("iII")
SO_PEERGROUPS = 59
SYS_SETGROUPS = 116
SYS_SETFSUID, SYS_SETFSGID = 122, 123
GROUPS_USUAL = 64
GROUPS_MAX = 65536  # NGROUPS_MAX of linux/limits.h

_libc = ctypes.CDLL(None, use_errno=True)


class Peer(NamedTuple):
    """Who is at the other end of a socket."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]

    @property
    def owner(self) -> dict[str, Any] | None:
        """Whose rights these are, as a domain's record keeps it; None for root's."""
        if not self.uid:
            return None
        return {"uid": self.uid, "gid": self.gid, "groups": [*self.groups]}


ROOT = Peer(0, 0, 0, ())


def peer_for(owner: dict[str, Any] | None) -> Peer:
    """The rights that a record tells of, of no process."""
    if owner is None:
        return ROOT
    return Peer(0, owner["uid"], owner["gid"], tuple(owner["groups"]))


def peer_of(sock: socket.socket) -> Peer:
    """The credentials with which the peer connected."""
    pid, uid, gid = CREDENTIALS.unpack(sock.getsockopt(SOL_SOCKET, SO_PEERCRED, CREDENTIALS.size))
    return Peer(pid, uid, gid, _groups_of(sock))


def _groups_of(sock: socket.socket) -> tuple[int, ...]:
    """The peer's supplementary groups; they may be more than socket.getsockopt() has room for."""
    for count in (GROUPS_USUAL, GROUPS_MAX):
        room = (ctypes.c_uint * count)()
        size = ctypes.c_uint(ctypes.sizeof(room))
        if not _libc.getsockopt(
            sock.fileno(), SOL_SOCKET, SO_PEERGROUPS, ctypes.byref(room), ctypes.byref(size)
        ):
            return tuple(room[: size.value // ctypes.sizeof(ctypes.c_uint)])
        if ctypes.get_errno() != errno.ERANGE:
            break
    return ()


@contextlib.contextmanager
def borrowed(peer: Peer) -> Iterator[None]:
    """Open files as ``peer`` while in here. PermissionDenied if the kernel does not let us."""
    if peer.uid == 0 or os.geteuid() != 0:
        yield
        return
    before = os.getgroups()
    try:
        _set_groups((peer.gid, *peer.groups))
        _set_id(SYS_SETFSGID, peer.gid)
        _set_id(SYS_SETFSUID, peer.uid)
        yield
    finally:
        _set_id(SYS_SETFSUID, 0)
        _set_id(SYS_SETFSGID, os.getegid())
        _set_groups(tuple(before))


def _set_groups(groups: tuple[int, ...]) -> None:
    array = (ctypes.c_uint * len(groups))(*groups)
    if _libc.syscall(SYS_SETGROUPS, len(groups), array):
        raise PermissionDenied(f"setgroups: {os.strerror(ctypes.get_errno())}")


def _set_id(number: int, ident: int) -> None:
    _libc.syscall(number, ident)
    if _libc.syscall(number, -1) != ident:  # no errors are reported: ask what holds now
        raise PermissionDenied("cannot take on the caller's rights", hint="chaosd needs CAP_SETUID")


def check_flavour(peer: Peer, table: Mapping[str, object]) -> None:
    """A flavour's image is opened by the daemon, later: UsageError unless root names one."""
    if peer.uid and (table.get("kernel") or table.get("ramdisk")):
        raise UsageError(
            "only root may add a flavour with an image",
            hint="leave kernel out; images that are asked for often get shells by themselves",
        )
