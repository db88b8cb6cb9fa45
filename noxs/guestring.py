"""A guest's store ring: as Dom0's (xenbus.py), with quotas, for a peer that may be hostile.

A turn takes at most what the ring holds, in whole requests up to the quota of replies that are not
yet in the ring, as xenstored does (domain_can_read() in tools/xenstored/domain.c). Events that wait
are kept once each, and lost above a bound, as there (send_event() in core.c).

What the guest may write into its page after a restart of the daemon harms itself: a page that does
not agree with the journal is cut off, as one with impossible indexes is.
"""

from __future__ import annotations

from collections import deque
from struct import Struct

from noxs import wire
from noxs.requests import WITHOUT_TRANSACTION, handle, refuse
from noxs.ring import ERROR_COMM, ERROR_PROTO, ERROR_RINGIDX, SIZE, Ring, RingError
from noxs.snapshot import KERNEL
from noxs.store import Connection
from noxs.wire import HEADER, HEADER_SIZE, PAYLOAD_MAX
from noxs.xenbus import XenBus
from xenctypes.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from noxs.journal import Journal
    from noxs.store import Store
    from noxs.tree import Quota
    from noxs.xenbus import Channel

RECORD = Struct("<BII")
"""How a record of a guest's journal starts: its kind, and the positions in the two streams up to
which the guest's requests were taken and the replies published when it was written."""
FROM_GUEST, RESET, FROM_TOOL = 1, 2, 3

GROWING = frozenset({wire.WRITE, wire.MKDIR, wire.SET_PERMS, wire.WATCH, wire.TRANSACTION_START})
"""Requests that make a store keep more; so do those in a transaction, which keeps what it reads."""
RELEASING = WITHOUT_TRANSACTION | {wire.TRANSACTION_END}
EVENTS_MAX = 1 << 18
"""Bytes of events that wait for a guest; what comes when there are more is lost."""
_U32 = 0xFFFFFFFF


def _grows(message: wire.Message) -> bool:
    op, _, tx_id, _ = message
    return op in GROWING or (tx_id != 0 and op not in RELEASING)


class GuestConnection(Connection):
    """A guest. ``waiting`` are the events that it has not been sent, ``size`` their bytes.

    ``sated``: it makes us keep as much as it may, and gets ENOMEM for requests that add to that.
    """

    __slots__ = ("sated", "size", "waiting")

    def __init__(self, domid: int, quota: Quota | None = None) -> None:
        super().__init__(KERNEL, domid, privileged=False, quota=quota)
        self.waiting: set[bytes] = set()
        self.size = 0
        self.sated = False

    def push(self, event: bytes) -> None:
        """See Connection."""
        if event in self.waiting and event[HEADER_SIZE] != 0x40:
            return
        self.waiting.add(event)
        self.size += len(event)
        self.out.append(event)

    def full(self) -> bool:
        """See Connection."""
        return self.size >= EVENTS_MAX


class GuestRing(XenBus):
    """One guest's ring, served turn by turn.

    ``handled`` counts the requests, ``outstanding`` the replies that are not wholly in the ring.
    """

    conn: GuestConnection
    reset_record = RECORD.pack(RESET, 0, 0)

    def __init__(self, ring: Ring, channel: Channel, store: Store, conn: GuestConnection) -> None:
        super().__init__(ring, channel, store, conn)
        self.name = f"domain {conn.domid}'s store ring"
        self.handled = 0
        self.outstanding = 0
        self._marks: deque[tuple[int, bytes]] = deque()
        self._queued = 0
        self._sent = 0

    # The journal

    def state(self) -> dict[str, Any]:
        """See XenBus."""
        state = super().state()
        state["marks"] = [(end - self._sent, event) for end, event in self._marks]
        return state

    def restore(self, state: dict[str, Any]) -> None:
        """See XenBus; the connection is the view's already."""
        super().restore(state)
        self._marks = deque(state["marks"])
        self._queued = len(self.queue)
        for _, event in self._marks:
            if event:
                self.conn.waiting.add(event)
                self.conn.size += len(event)
            else:
                self.outstanding += 1

    def mark(self, kind: int, cons: int | None = None) -> bytes:
        """How a journal record of this moment starts."""
        return RECORD.pack(kind, self.cons if cons is None else cons, self.prod)

    def replay(self, record: bytes) -> None:
        """Do again what a journal record of the guest's says. StateError if it does not fit."""
        kind, cons, prod = RECORD.unpack_from(record)
        if kind == RESET:
            self._forget()
            return
        self.advance(prod)
        self._take(record[RECORD.size :])
        self.cons = cons

    def advance(self, prod: int) -> None:
        """Count as published what was published up to a position. StateError."""
        self.collect()
        sent = (prod - self.prod) & _U32
        if sent > len(self.queue):
            raise StateError(f"{self.name}: the journal says that {sent} bytes were sent")
        self._published(sent)
        self.prod = prod

    def resume(self) -> None:
        """Agree with the page, or cut the guest off."""
        self.collect()
        ring = self.ring
        if ring.reconnecting:
            return
        behind = (self.cons - ring.req_cons) & _U32
        sent = (ring.rsp_prod - self.prod) & _U32
        if ring.error:
            self._forget()
            self.dead = f"error {ring.error} was found after a restart"
        elif self.decoder.bad:
            self._fail(ERROR_PROTO, f"a request of {self.decoder.bad[3]} bytes")
        elif behind > SIZE or sent > len(self.queue):
            self._fail(ERROR_RINGIDX, "the page does not match the journal")
        else:
            ring.consume(behind)
            self._published(sent)
            self.prod = ring.rsp_prod
            ring.advertise()

    # Service

    def collect(self) -> None:
        """See XenBus."""
        for message in self.conn.out:
            self._queued += len(message)
            event = message[0] == wire.WATCH_EVENT
            self.outstanding += not event
            self._marks.append((self._queued, message if event else b""))
        super().collect()

    def turn(self, journal: Journal | None) -> bool:
        """Move and answer what one turn may; whether there may be more to do at once.

        OSError: the journal could not be written, nothing was taken.
        """
        if self.ring.reconnecting:
            self._reset(journal)
        if self.dead:
            return False
        try:
            moved = self._move(journal)
        except RingError as error:
            self._fail(ERROR_RINGIDX, str(error))
            return False
        if moved:
            self.channel.notify()
        return moved

    def cut_off(self, why: str) -> None:
        """Stop serving the guest, for a reason that is not in its ring."""
        self._fail(ERROR_COMM, why)

    @property
    def unsettled(self) -> bool:
        """Whether the guest has to do something before all is done: read, or send the rest."""
        return not self.dead and bool(self.queue or self.decoder.pending)

    def _move(self, journal: Journal | None) -> bool:
        data = self._admitted()
        if data:
            cons = (self.cons + len(data)) & _U32
            if journal is not None:
                journal.append(self.mark(FROM_GUEST, cons) + data)
            self.cons = cons
            self.ring.consume(len(data))
            self._take(data)
            if self.decoder.bad:
                self._fail(ERROR_PROTO, f"a request of {self.decoder.bad[3]} bytes")
                return False
        self.collect()
        sent = self.ring.send(self.queue) if self.queue else 0
        if sent:
            self._published(sent)
            self.prod = self.ring.rsp_prod
        return bool(data or sent)

    def _admitted(self) -> bytes:
        """What may be taken: no more requests than replies may be outstanding."""
        data = self.ring.received()
        pending = self.decoder.pending
        whole = pending + data if pending else data
        offset = 0
        for _ in range(self.conn.quota.outstanding - self.outstanding):
            if len(whole) - offset < HEADER_SIZE:
                return data
            length = HEADER.unpack_from(whole, offset)[3]
            offset += HEADER_SIZE + length
            if length > PAYLOAD_MAX or offset > len(whole):
                return data
        return data[: max(0, offset - len(pending))]

    def _take(self, data: bytes) -> None:
        for message in self.decoder.feed(data):
            if self.conn.sated and _grows(message):
                refuse(self.store, self.conn, message, b"ENOMEM")
            else:
                handle(self.store, self.conn, message)
            self.handled += 1

    def _published(self, count: int) -> None:
        del self.queue[:count]
        self._sent += count
        marks = self._marks
        while marks and marks[0][0] <= self._sent:
            _, event = marks.popleft()
            if event:
                self.conn.waiting.discard(event)
                self.conn.size -= len(event)
            else:
                self.outstanding -= 1

    def _silence(self) -> None:
        super()._silence()
        self._marks.clear()
        self.conn.waiting.clear()
        self.conn.size = self.outstanding = 0
        self._queued = self._sent = 0
