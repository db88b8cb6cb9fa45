"""One stock guest: its private store, its ring, its devices, and its journal.

::

    opened --------> introduced --------> cut off
      |   INTRODUCE      |   its ring is broken   |
      +------------------+------------------------+--> released

The toolstack fills an opened guest's tree before the guest runs; from INTRODUCE on its ring is
served. A guest that was cut off can connect again by its ring's reconnection feature.
"""

from __future__ import annotations

import marshal
from math import inf

from noxs import snapshot, wire
from noxs.bucket import Bucket
from noxs.guestring import FROM_TOOL, RECORD, GuestConnection, GuestRing
from noxs.handshake import FRONT, STATE, differences, front_key, front_value, in_order
from noxs.requests import handle
from noxs.snapshot import KERNEL
from noxs.store import Connection, Store
from noxs.wire import PERM_NONE, PERM_READ, Decoder, StoreError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from noxs.journal import Journal
    from noxs.tree import Quota, Tree
    from noxs.wire import Message, Perms

    Key = tuple[bytes, int]
    Log = Callable[[str], None]

ATTACH, DETACH = 4, 5
"""Kinds of journal records beside guestring's: a device's kind, number and nodes, marshalled."""

TOOL, EYE, LEGS = 1, 2, 3
"""The numbers of a store's connections: the daemon's own two, then the control socket's."""

COMPACT_AFTER = 1 << 18
"""Bytes of log after which a guest's journal is compacted, unless its snapshot is larger."""
WORK_RATE, WORK_BURST = 0.2, 0.25
"""The share of a processor that one guest may have, and for how many seconds at once."""
FORWARD_RATE, FORWARD_BURST = 10, 20
"""How often a second, and how often at once, a guest's changes are passed to Dom0's bus."""
LOG_RATE, LOG_BURST = 0.1, 5
DEVICES_MAX = 256

_JOURNALLED = frozenset({wire.WRITE, wire.MKDIR, wire.RM, wire.SET_PERMS})


class Device:
    """A vif or vbd of a guest: ``front`` and ``back`` are its directories.

    ``told`` is what was passed on of the front end's keys, ``refused`` the keys that were not.
    """

    def __init__(self, domid: int, kind: bytes, devid: int) -> None:
        self.kind = kind
        self.devid = devid
        self.front = b"/local/domain/%d/device/%s/%d" % (domid, kind, devid)
        self.back = b"/local/domain/0/backend/%s/%d/%d" % (kind, domid, devid)
        self.told: dict[bytes, bytes] = {}
        self.refused: set[bytes] = set()

    @property
    def token(self) -> bytes:
        """Its name among the guest's devices."""
        return b"%s/%d" % (self.kind, self.devid)

    def restored(self, tree: Tree) -> set[bytes]:
        """Have all be told that it may tell, and the state even if it is gone; the keys."""
        keys = {key for key, _ in _front_keys(tree, self.front) if front_key(self.kind, key)}
        self.told = dict.fromkeys(keys | {STATE}, b"")  # a value that none of them has
        return keys

    def changes(self, tree: Tree) -> dict[bytes, bytes | None]:
        """What the back end is to be told: values of keys, None for those that are gone."""
        now: dict[bytes, bytes] = {}
        self.refused.clear()
        for key, value in _front_keys(tree, self.front):
            if front_value(self.kind, key, value):
                now[key] = value
            elif key not in TOOLSTACK_KEYS:
                self.refused.add(key)
                if key in self.told:
                    now[key] = self.told[key]
        found = differences(now, self.told)
        self.told = now
        return found


TOOLSTACK_KEYS = frozenset(
    {b"backend", b"backend-id", b"handle", b"mac", b"mtu", b"trusted"}
    | {b"virtual-device", b"device-type"}
)
"""What the toolstack writes into a front end's directory, for the guest to read."""


def _front_keys(tree: Tree, front: bytes) -> list[tuple[bytes, bytes]]:
    """The nodes of a front end's directory, and of its queues', that have a value."""
    found = []
    node = tree.nodes.get(front)
    for name in (node.children or ()) if node else ():
        child = tree.nodes[front + b"/" + name]
        if not name.startswith(b"queue-"):
            found.append((name, child.value))
            continue
        for leaf in child.children or ():
            key = name + b"/" + leaf
            found.append((key, tree.nodes[front + b"/" + key].value))
    return found


class Eye(Connection):
    """Watches the front ends' directories, for the bridge; notes the devices that changed."""

    __slots__ = ("dirty",)

    def __init__(self, domid: int) -> None:
        super().__init__(EYE, domid)
        self.dirty: dict[bytes, None] = {}

    def push(self, event: bytes) -> None:
        """See Connection."""
        self.dirty[event[:-1].rpartition(b"\0")[2]] = None


class Guest:
    """See the module. ``serial`` tells guests apart that had the same domid one after the other.

    ``due`` is when the guest is to be served without an event, ``guard`` the seconds until it is
    looked at once more; both are the loop's. ``port`` is the guest's event channel, ``local_port``
    our end of it, ``unheard`` what back ends say that is not yet in the view. ``share`` bounds what
    is kept for it while all guests have too much kept, ``kept`` is what the loop has counted.
    """

    def __init__(
        self,
        domid: int,
        uuid: str,
        *,
        serial: int,
        boot: str,
        journal: Journal | None,
        log: Log,
        now: float,
        quota: Quota | None = None,
    ) -> None:
        self.domid = domid
        self.uuid = uuid
        self.serial = serial
        self.boot = boot
        self.journal = journal
        self.port = 0
        self.local_port = 0
        self.unheard: dict[bytes, dict[bytes, bytes]] = {}
        self.ring: GuestRing | None = None
        self.devices: dict[bytes, Device] = {}
        self.store = Store(self._log)
        self.store.introduced = {0, domid}
        self.conn = GuestConnection(domid, quota)
        self.tool = Connection(TOOL)
        self.eye = Eye(domid)
        self.next_leg = LEGS
        self.work = Bucket(WORK_RATE, WORK_BURST, now)
        rate = self.conn.quota.request_rate
        self.requests = Bucket(rate, 2 * rate, now)
        self.forwards = Bucket(FORWARD_RATE, FORWARD_BURST, now)
        self.due = inf
        self.guard = 0.0
        self.share = inf
        self.kept = 0
        self._lines = Bucket(LOG_RATE, LOG_BURST, now)
        self._now = now
        self._log_line = log

    def _log(self, text: str) -> None:
        """A line, unless the guest had the daemon write too many already."""
        if not self._lines.wait(self._now):
            self._log_line(text)
            self._lines.take(1, self._now)

    def tick(self, now: float) -> None:
        """Tell the guest the time, by which it may log."""
        self._now = now

    # Life

    def open(self, name: str) -> None:
        """Make the tree of a new guest."""
        for conn in (self.conn, self.tool, self.eye):
            self.store.connect(conn)
        for path, value, perms in skeleton(self.domid, self.uuid, name):
            self.store.tree.write(self.tool, None, path, value)
            self.store.tree.set_perms(self.tool, None, path, perms)
        self.save()

    def introduce(self, ring: GuestRing, port: int) -> None:
        """Serve the guest's ring from now on."""
        ring.ring.advertise()
        self.ring, self.port = ring, port
        self.save()

    def save(self) -> None:
        """Replace the journal by a snapshot. OSError when that fails."""
        if self.journal is not None:
            extra = {
                "boot": self.boot,
                "domid": self.domid,
                "uuid": self.uuid,
                "port": self.port,
                "devices": [(device.kind, device.devid) for device in self.devices.values()],
                "ring": self.ring.state() if self.ring else None,
                "share": self.share,
            }
            self.journal.replace(snapshot.dump(self.store, extra))
            self._weigh()

    def forget(self) -> None:
        """End the references that go in circles, for there is no collector (noxs.daemon.run)."""
        for conn in (self.conn, self.tool, self.eye):
            self.store.reset(conn)
            self.store.touched.discard(conn)
        self.store.log = self._log_line

    def _weigh(self) -> None:
        """Judge by the snapshot, which holds all that the guest makes us keep, and by it alone.

        A replay of the log must come to the same replies: the share is that of the snapshot.
        """
        if self.journal is not None:
            self.conn.sated = self._has_enough()

    def _has_enough(self) -> bool:
        assert self.journal is not None
        return self.journal.base > min(self.conn.quota.memory, self.share)

    def compact(self) -> None:
        """Replace the journal by a snapshot when its log has grown long, or it is to be judged."""
        journal = self.journal
        if journal is None:
            return
        sated = self.conn.sated
        longest = COMPACT_AFTER if sated else max(COMPACT_AFTER, journal.base)
        if journal.length > min(longest, self.share) or sated != self._has_enough():
            self.save()

    def restore(
        self,
        data: dict[str, Any],
        records: Iterable[bytes],
        make_ring: Callable[[Guest], GuestRing],
    ) -> None:
        """Back to what the journal says; StateError when it cannot be."""
        extra = data["extra"]
        made = {KERNEL: self.conn}
        snapshot.fill(self.store, data, lambda ident: made.get(ident) or Connection(ident))
        self.share = extra.get("share", inf)
        self._weigh()
        self.store.connect(self.tool)
        self.store.connect(self.eye)
        for kind, devid in extra["devices"]:
            self._adopt(Device(self.domid, kind, devid))
        self.port = extra["port"]
        if extra["ring"] is not None:
            self.ring = make_ring(self)
            self.ring.restore(extra["ring"])
        for record in records:
            self._replay(record)
        if self.ring is not None:
            self.ring.resume()
        for device in self.devices.values():
            self.eye.dirty[device.token] = None

    def _replay(self, record: bytes) -> None:
        kind, _, prod = RECORD.unpack_from(record)
        body = record[RECORD.size :]
        if kind not in {FROM_TOOL, ATTACH, DETACH}:
            assert self.ring is not None
            self.ring.replay(record)
            return
        if self.ring is not None:
            self.ring.advance(prod)
        if kind == ATTACH:
            self._attach(*marshal.loads(body))  # noqa: S302 - storesd's own directory
        elif kind == DETACH:
            self._detach(body)
        else:
            for message in Decoder().feed(body):
                handle(self.store, self.tool, message)
        self.tool.out.clear()

    def _record(self, kind: int, body: bytes) -> None:
        """Journal a change before it is made. OSError: it must not be made."""
        if self.journal is not None:
            mark = self.ring.mark(kind) if self.ring else RECORD.pack(kind, 0, 0)
            self.journal.append(mark + body)

    # The toolstack's and the bridge's changes

    def handle(self, conn: Connection, message: Message) -> None:
        """Answer a privileged request, journalled. OSError: it was not, and nothing was done."""
        op, _, _, payload = message
        if op in _JOURNALLED:
            self._record(FROM_TOOL, wire.pack(op, 0, 0, payload))
        handle(self.store, conn, message)

    def write(self, path: bytes, value: bytes | None) -> None:
        """Write a node, or remove it. OSError as for ``handle``."""
        if value is None:
            self.handle(self.tool, (wire.RM, 0, 0, path + b"\0"))
        else:
            self.handle(self.tool, (wire.WRITE, 0, 0, path + b"\0" + value))
        self.tool.out.clear()

    # Devices

    def show(self) -> None:
        """Bring what back ends say into the view. OSError: some is left for another attempt."""
        nodes = self.store.tree.nodes
        for token, found in list(self.unheard.items()):
            device = self.devices.get(token)
            node = nodes.get(device.back) if device else None
            if device is not None and node is not None:
                names = list(node.children or ())
                shown = {name: nodes[device.back + b"/" + name].value for name in names}
                for key, value in differences(found, shown).items():
                    self.write(device.back + b"/" + key, value)
            del self.unheard[token]

    def attach(self, kind: bytes, devid: int, pairs: dict[bytes, bytes]) -> Device:
        """Give the guest a device: its front end's directory with ``pairs``, and its back end's.

        StoreError: EINVAL, EEXIST, ENOSPC. OSError as for ``handle``. Attaching again what is
        attached, with its nodes in place, changes nothing.
        """
        if kind not in FRONT or not 0 <= devid < 1 << 29:
            raise StoreError(b"EINVAL")
        for name in pairs:
            if b"/" in name:
                raise StoreError(b"EINVAL")
            wire.canonical(name, b"")
        device = self.devices.get(b"%s/%d" % (kind, devid))
        if device is not None:
            if device.front in self.store.tree.nodes:
                return device
            raise StoreError(b"EEXIST")
        if len(self.devices) >= DEVICES_MAX:
            raise StoreError(b"ENOSPC")
        self._record(ATTACH, marshal.dumps((kind, devid, pairs), snapshot.FORMAT))
        return self._attach(kind, devid, pairs)

    def _attach(self, kind: bytes, devid: int, pairs: dict[bytes, bytes]) -> Device:
        device = Device(self.domid, kind, devid)
        front: dict[bytes, bytes] = {
            **pairs, b"backend": device.back, b"backend-id": b"0", STATE: b"1",
        }  # fmt: skip
        back = {b"frontend": device.front, b"frontend-id": b"%d" % self.domid, STATE: b"1"}
        owners: tuple[tuple[bytes, dict[bytes, bytes], Perms], ...] = (
            (device.back, back, ((0, PERM_NONE), (self.domid, PERM_READ))),
            (device.front, front, ((self.domid, PERM_NONE), (0, PERM_READ))),
        )
        for directory, nodes, perms in owners:
            self._remove(directory)
            self._make(directory, b"", perms)
            for key in in_order([*nodes]):
                self._make(directory + b"/" + key, nodes[key], perms)
        self._adopt(device)
        device.told = {STATE: b"1"}
        self.eye.dirty.pop(device.token, None)
        return device

    def _make(self, path: bytes, value: bytes, perms: Perms) -> None:
        self.store.tree.write(self.tool, None, path, value)
        self.store.tree.set_perms(self.tool, None, path, perms)
        self.store.fire(path)

    def _remove(self, path: bytes) -> None:
        if path in self.store.tree.nodes:
            self.store.announce(None, self.store.tree.remove(self.tool, None, path))

    def _adopt(self, device: Device) -> None:
        self.devices[device.token] = device
        self.store.add_watch(self.eye, device.front, device.token)

    def detach(self, kind: bytes, devid: int) -> Device:
        """Take a device away, with its nodes. StoreError: ENOENT. OSError as for ``handle``."""
        token = b"%s/%d" % (kind, devid)
        if token not in self.devices:
            raise StoreError(b"ENOENT")
        self._record(DETACH, token)
        return self._detach(token)

    def _detach(self, token: bytes) -> Device:
        device = self.devices.pop(token)
        self.store.drop_watch(self.eye.watches.pop((device.front, token)))
        self.eye.dirty.pop(token, None)
        self.unheard.pop(token, None)
        self._remove(device.front)
        self._remove(device.back)
        return device

    def owns(self, path: bytes) -> bool:
        """Whether a path belongs to this guest's view."""
        return any(path == top or path.startswith(top + b"/") for top in self.tops())

    def tops(self) -> list[bytes]:
        """The directories that the guest's view consists of."""
        return [
            b"/local/domain/%d" % self.domid,
            b"/vm/" + self.uuid.encode(),
            *(b"/local/domain/0/backend/%s/%d" % (kind, self.domid) for kind in FRONT),
        ]


def skeleton(domid: int, uuid: str, name: str) -> list[tuple[bytes, bytes, Perms]]:
    """The nodes of every guest: (path, value, permissions); as libxl__domain_make() has them."""
    base, vm = b"/local/domain/%d" % domid, b"/vm/" + uuid.encode()
    text = name.encode()
    shown: Perms = ((0, PERM_NONE), (domid, PERM_READ))
    owned: Perms = ((domid, PERM_NONE),)
    readable = {
        b"": b"", b"/vm": vm, b"/name": text, b"/domid": b"%d" % domid, b"/cpu": b"",
        b"/memory": b"", b"/device": b"", b"/control": b"",
        b"/control/platform-feature-multiprocessor-suspend": b"1",
        b"/control/platform-feature-xs_reset_watches": b"1",
    }  # fmt: skip
    writable = (
        b"/control/shutdown", b"/control/feature-poweroff", b"/control/feature-reboot",
        b"/control/feature-suspend", b"/control/sysrq", b"/data", b"/drivers", b"/feature",
        b"/attr", b"/error", b"/device/suspend/event-channel",
    )  # fmt: skip
    return [
        (vm, b"", shown),
        (vm + b"/uuid", uuid.encode(), shown),
        (vm + b"/name", text, shown),
        *((base + path, value, shown) for path, value in readable.items()),
        *((base + path, b"", owned) for path in writable),
    ]
