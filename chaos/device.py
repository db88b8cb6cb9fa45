"""Devices that a guest connects itself, by the classic handshake: their nodes.

The toolstack writes both ends in state 1; the driver in Dom0 writes what it offers and goes to
state 2, the guest's what it wants and 3 or 4. Vifs of noxs guests are connected already (vif.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from noxs.bus import Bus, Transaction

    Value = str | int

DOM0 = 0
INITIALISING = "1"  # XenbusStateInitialising, io/xenbus.h


class Device(NamedTuple):
    """A device of a guest: its ``kind`` ("vif", "vbd"), its number, and what its nodes say.

    ``front`` is for the guest to read, ``back`` for the driver in Dom0. The nodes that all
    devices have, such as ``state``, are written besides.
    """

    kind: str
    devid: int
    front: Mapping[str, Value]
    back: Mapping[str, Value]


def backend_path(domid: int, kind: str, devid: int) -> str:
    """The back end's directory on the bus."""
    return f"/local/domain/{DOM0}/backend/{kind}/{domid}/{devid}"


def frontend_path(domid: int, kind: str, devid: int) -> str:
    """The front end's directory, on the bus and in the guest's store."""
    return f"/local/domain/{domid}/device/{kind}/{devid}"


def offer(bus: Bus, domid: int, devices: Sequence[Device], *, shared: bool) -> None:
    """Write the nodes of ``devices`` on the bus, at once. Raises BusError.

    ``shared``: the guest uses the bus as its store, so that the nodes get the permissions that
    libxl__device_generic_add() gives them.
    """
    if not devices:
        return

    def write(tx: Transaction) -> None:
        for device in devices:
            _write(tx, domid, device, shared=shared)

    make(bus, domid, devices[0].kind, devices[0].devid, write)


def make(bus: Bus, domid: int, kind: str, devid: int, write: Callable[[Transaction], None]) -> None:
    """Have ``write`` make the nodes of devices, of which this is one, at once. Raises BusError.

    Not again after a commit whose reply was lost: that would undo what the drivers did since.
    """
    made = f"{backend_path(domid, kind, devid)}/frontend-id"

    def unless_made(tx: Transaction) -> None:
        if tx.get(made) is None:
            write(tx)

    bus.transact(unless_made, repeatable=True)


def _write(tx: Transaction, domid: int, device: Device, *, shared: bool) -> None:
    front = frontend_path(domid, device.kind, device.devid)
    back = backend_path(domid, device.kind, device.devid)
    if shared:
        for directory, perms in (
            (front, (f"n{domid}", f"r{DOM0}")),
            (back, (f"n{DOM0}", f"r{domid}")),
        ):
            tx.mkdir(directory)
            tx.set_perms(directory, perms)  # what is made below has the same
    fronts = {"backend": back, "backend-id": DOM0, **device.front, "state": INITIALISING}
    backs = {
        "frontend": front, "frontend-id": domid, "online": 1, **device.back, "state": INITIALISING,
    }  # fmt: skip
    tx.write_many([(f"{front}/{key}", value) for key, value in fronts.items()])
    tx.write_many([(f"{back}/{key}", value) for key, value in backs.items()])
