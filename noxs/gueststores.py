"""The toolstack's client of storesd: guests' private stores.

It is a bus client (bus.py): nodes of all guests can be read, written, watched and waited for by
their paths. There are no transactions. A guest is made so::

    with GuestStores.connect() as stores:
        stores.open(domid, uuid, name)
        stores.write_many([(f"/local/domain/{domid}/memory/target", kib), ...])
        stores.attach(domid, "vif", 0, {"mac": mac, "handle": 0})
        stores.introduce(domid, 0, port)

before it runs, with its devices' nodes written on Dom0's bus before they are attached.
"""

from __future__ import annotations

import errno as errnos
import os

from noxs import lockfile, wire
from noxs.bus import PATIENCE, Bus
from noxs.nodes import string
from noxs.session import Session
from xenctypes.errors import BusError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Self

    from noxs.nodes import Value

SOCKET = "/run/noxs/storesd"


def _socket() -> str:
    return os.environ.get("NOXS_STORES") or SOCKET


def running() -> bool:
    """Whether storesd runs on this host."""
    return lockfile.held(f"{_socket()}.lock")


class GuestStores(Bus):
    """A connection to storesd. All methods raise BusError, with ``errno``."""

    @classmethod
    def connect(cls, path: str | None = None, *, patience: float = PATIENCE) -> Self:
        """Connect to storesd at ``path``, $NOXS_STORES, or its usual place."""
        path = path or _socket()
        try:
            return cls(Session((path,), patience))
        except BusError as error:
            raise BusError(
                f"storesd does not answer: {error.message}",
                errno=error.errno,
                hint="start storesd: it serves guests that want a XenStore",
            ) from error

    def open(self, domid: int, uuid: str, name: str) -> None:
        """Make a guest's store, with the nodes that every guest has.

        A store that was opened for this domid and never introduced is replaced. EEXIST: the domid
        or the UUID is that of a guest that is served.
        """
        self._control("open", domid, uuid, name)

    def attach(self, domid: int, kind: str, devid: int, nodes: Mapping[str, Value]) -> None:
        """Give a guest a device ("vif" or "vbd"); ``nodes`` are for its front end to read.

        ``backend``, ``backend-id`` and ``state`` are written besides. What front and back end say
        goes between the guest's store and Dom0's bus from now on. Nothing happens if the guest
        has the device.
        """
        self._control(
            "attach", domid, kind, devid, *(text for pair in nodes.items() for text in pair)
        )

    def detach(self, domid: int, kind: str, devid: int) -> None:
        """Take a device away, with its nodes. Nothing happens if the guest does not have it."""
        try:
            self._control("detach", domid, kind, devid)
        except BusError as error:
            if error.errno != errnos.ENOENT:
                raise

    def release(self, domid: int) -> None:
        """Forget a guest and let go of its memory. Nothing happens if there is none."""
        try:
            super().release(domid)
        except BusError as error:
            if error.errno != errnos.ENOENT:
                raise

    def _control(self, *words: Value) -> None:
        payload = b"".join(map(string, words))
        self.ask(wire.CONTROL, payload, f"{words[0]} {words[1]}")
