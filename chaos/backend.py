"""A back end in Dom0's kernel: where it is on the bus, how one hears from it, and its end.

Common to all kinds; ``kind`` is "vbd" as in the bus's paths and in the names of sysfs.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import contextmanager
from errno import ETIMEDOUT
from typing import TYPE_CHECKING

from chaos.device import DOM0, INITIALISING, backend_path, frontend_path
from noxs import hotplug
from xenctypes.errors import BusError, DeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from noxs.bus import Bus, Transaction

CONNECTED, CLOSING, CLOSED = "4", "5", "6"  # xenbus_state, io/xenbus.h
CLOSE_TIMEOUT = 30.0
CLOSE_SECONDS = 10.0
"""How long a guest may take to close a device, as with xl."""
LOOK_EVERY = 1.0  # seconds between looks at what no watch tells of
_NUMBER = re.compile(r"[0-9]{1,10}\Z")
DEVICES = "/sys/devices"  # a link below /sys/bus would go before the driver has let go


def directory(domid: int, kind: str) -> str:
    """Where the back ends of a domain's devices are on the bus."""
    return f"/local/domain/{DOM0}/backend/{kind}/{domid}"


def error_path(domid: int, kind: str, devid: int) -> str:
    """Where the driver says what went wrong (xenbus_va_dev_error)."""
    return f"{_errors(domid, kind)}/{devid}/error"


def _errors(domid: int, kind: str) -> str:
    return f"/local/domain/{DOM0}/error/backend/{kind}/{domid}"


def driven(domid: int, kind: str, devid: int) -> bool:
    """Whether a driver has the device."""
    return os.path.exists(f"{DEVICES}/{kind}-{domid}-{devid}/driver")


def ask_to_close(bus: Bus, domid: int, kind: str, devid: int) -> bool:
    """Have a running guest close a device; False if it does not in CLOSE_SECONDS. BusError.

    One that the guest has not begun to connect, having no driver for it, is as good as closed. What
    a guest does not close in time is left in state 5, and goes when the guest lets go of it.
    """
    back = backend_path(domid, kind, devid)
    state, front = f"{back}/state", f"{frontend_path(domid, kind, devid)}/state"

    def write(tx: Transaction) -> bool:
        if tx.get(state) in {None, CLOSED} or tx.get(front) in {None, INITIALISING}:
            return False
        tx.write_many([(f"{back}/online", "0"), (state, CLOSING)])
        return True

    if not bus.transact(write, repeatable=True):
        return True
    try:
        # The driver says so, or its device is gone, once the guest has closed its end.
        bus.wait_for(state, lambda value: value in {None, CLOSED}, CLOSE_SECONDS)
    except BusError as error:
        if error.errno != ETIMEDOUT:
            raise
        return False
    return True


def known(bus: Bus, domid: int, kind: str) -> list[int]:
    """The ids of a domain's devices that the bus knows, in order. Raises BusError."""
    return sorted(map(int, bus.children(directory(domid, kind)) or ()))


def rows(
    bus: Bus, domid: int, kind: str, back: Sequence[str], front: Sequence[str]
) -> list[dict[str, str | int | None]]:
    """A domain's devices for a listing: keys of the back end, and numbers of the front end.

    What is missing is None, and so is what the guest wrote and is no number. Raises BusError.
    """
    found: list[dict[str, str | int | None]] = []
    for devid in known(bus, domid, kind):
        path, frontend = backend_path(domid, kind, devid), frontend_path(domid, kind, devid)
        said = bus.read_many(f"{path}/{key}" for key in back)
        wrote = bus.read_many(f"{frontend}/{key}" for key in front)
        row: dict[str, str | int | None] = {"devid": devid, "backend": path}
        row.update(zip(back, said, strict=True))
        row.update(zip(front, map(_number, wrote), strict=True))
        found.append(row)
    return found


def _number(text: str | None) -> int | None:
    return int(text) if text and _NUMBER.match(text) else None


def close(bus: Bus, domid: int, kind: str, devids: Sequence[int]) -> None:
    """Have the driver let go of devices, and remove their nodes; missing ones are fine.

    Raises DeviceError when that takes longer than CLOSE_TIMEOUT; the nodes are removed even then.
    """
    backs = [backend_path(domid, kind, devid) for devid in devids]
    fronts = [frontend_path(domid, kind, devid) for devid in devids]
    changes: list[tuple[str, str]] = []
    for back, front in zip(backs, fronts, strict=True):
        if bus.exists(f"{back}/frontend"):
            changes += [(f"{back}/online", "0"), (f"{front}/state", CLOSED)]
    if changes:
        bus.transact(lambda tx: tx.write_many(changes), repeatable=True)
    deadline = time.monotonic() + CLOSE_TIMEOUT
    # A device whose probe failed has no driver to close it; it goes with its nodes.
    wait_for(deadline, lambda: not any(driven(domid, kind, devid) for devid in devids))
    bus.rm_many([*backs, *fronts, _errors(domid, kind)])
    base = f"/local/domain/{DOM0}/error"
    _prune(bus, (directory(domid, kind), f"/local/domain/{domid}"))
    _prune(bus, (f"{base}/backend/{kind}", f"{base}/backend", base))
    left = [f"{kind}-{domid}-{devid}" for devid in devids]
    # Whoever kept the driver busy until the end has not used up the kernel's time as well.
    deadline = max(deadline, time.monotonic() + CLOSE_TIMEOUT / 3)
    if not wait_for(deadline, lambda: not any(os.path.exists(f"{DEVICES}/{n}") for n in left)):
        names = ", ".join(name for name in left if os.path.exists(f"{DEVICES}/{name}"))
        raise DeviceError(f"the driver does not let go of {names}", hint="dmesg says why")


def wait_for(deadline: float, condition: Callable[[], bool]) -> bool:
    """Wait for the kernel to finish with a device: nothing that we could wait on tells of it."""
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


def _prune(bus: Bus, directories: Sequence[str]) -> None:
    """Remove directories that hold nothing any more but empty ones."""
    for path in directories:
        if bus.exists(path) and not _leaves(bus, path):
            bus.rm(path)


def _leaves(bus: Bus, path: str) -> bool:
    if bus.get(path):
        return True
    return any(_leaves(bus, f"{path}/{name}") for name in bus.children(path) or ())


@contextmanager
def watching(bus: Bus, path: str) -> Iterator[Callable[[float], Iterator[None]]]:
    """Watch a backend directory; what is yielded gives turns: at once, after changes, now and then.

    Only changes that tell how far a device is count: a driver writes a dozen other nodes for each.
    """
    token = f"devices {path}"
    bus.watch(path, token)

    def tells(changed: str) -> bool:
        return changed == path or changed.rpartition("/")[2] in {"state", hotplug.STATUS}

    def changes(timeout: float) -> Iterator[None]:
        deadline = time.monotonic() + timeout
        yield None
        while (left := deadline - time.monotonic()) > 0:
            events = bus.events(min(left, LOOK_EVERY))
            if not events or any(tells(changed) for changed, _ in events):
                yield None

    try:
        yield changes
    finally:
        bus.unwatch(path, token)
