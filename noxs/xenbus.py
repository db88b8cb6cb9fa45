"""Dom0's XenBus page: the kernel's requests in, replies and watch events out.

What survives a kill at any instruction, and why::

    received --> journal --> consume --> handle --> send --> notify
             |           |                       |
    a kill   it is still the page's req_cons     replay gives the same stream again,
    here:    in the ring is put right at start   the page's rsp_prod says what to skip

The page keeps req_cons (what the kernel may overwrite) and rsp_prod (what it has been given); the
journal every byte that was consumed. The tree, the watches, the transactions, a half-read request
and the stream to the kernel follow from the journal. So a request is handled exactly once, and its
reply sent exactly once.
"""

from __future__ import annotations

from struct import Struct

from noxs.requests import handle
from noxs.ring import ERROR_PROTO, ERROR_RINGIDX, SIZE, Ring, RingError
from noxs.snapshot import KERNEL
from noxs.store import Connection
from noxs.wire import Decoder
from xenctypes.errors import StateError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from noxs.journal import Journal
    from noxs.store import Store

    class Channel(Protocol):
        """A ring's event channel, bound; readable while an event waits."""

        def fileno(self) -> int: ...  # noqa: D102 - as for files
        def take(self) -> None:
            """Take the waiting event, and let the next one through."""

        def notify(self) -> None:
            """Wake the peer. A system call, hence a full memory barrier."""


RECORD = Struct("<BI")
"""How a journal record starts: its kind, and the position or the connection it belongs to."""
FROM_KERNEL, RESET = 1, 2

GUARD = 0.02
"""Seconds after which the page is looked at once more. Linux decides without a barrier, after its
store, whether an event is needed (xb_write() in xenbus_comms.c), so one can be missing."""

ROUNDS = 32
_U32 = 0xFFFFFFFF


class XenBus:
    """The kernel's connection to a store view.

    ``cons`` is the position in its stream up to which requests are journalled, ``queue`` what is
    not yet published of the stream to it, ``dead`` why it is no longer served, if it is not.
    """

    name = "Dom0's XenBus page"
    reset_record = RECORD.pack(RESET, 0)

    def __init__(
        self, ring: Ring, channel: Channel, store: Store, conn: Connection | None = None
    ) -> None:
        self.ring = ring
        self.channel = channel
        self.store = store
        self.conn = conn or Connection(KERNEL)
        self.decoder = Decoder()
        self.queue = bytearray()
        self.cons = ring.req_cons
        self.prod = ring.rsp_prod
        self.dead = ""

    def attach(self) -> None:
        """Make the kernel known to the view, on a page that no server has used."""
        self.store.connect(self.conn)
        self.ring.advertise()

    def state(self) -> dict[str, Any]:
        """What a snapshot needs beside the view."""
        self.collect()
        return {
            "cons": self.cons,
            "prod": self.prod,
            "pending": self.decoder.pending,
            "queue": bytes(self.queue),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Back to a snapshot's state, with the view already restored."""
        self.conn = self.store.connections[KERNEL]
        self.cons, self.prod = state["cons"], state["prod"]
        self.decoder = Decoder(state["pending"])
        self.queue = bytearray(state["queue"])

    def replay(self, record: bytes) -> None:
        """Do again what a journal record says."""
        kind, position = RECORD.unpack_from(record)
        if kind == RESET:
            self._forget()
            return
        self._take(record[RECORD.size :])
        self.cons = position

    def resume(self) -> None:
        """Agree with the page, which is as the killed process left it. StateError if it is not."""
        self.collect()
        ring = self.ring
        if ring.reconnecting:
            return
        if ring.error:
            self._forget()
            self.dead = f"error {ring.error} was found before noxsd was restarted"
            return
        behind = (self.cons - ring.req_cons) & _U32
        sent = (ring.rsp_prod - self.prod) & _U32
        if behind > SIZE or sent > len(self.queue):
            raise StateError(
                "Dom0's XenBus page does not match the journal: another store has used it since",
                hint="the kernel's watches are lost with it: reboot the host",
            )
        ring.consume(behind)
        del self.queue[:sent]
        self.prod = ring.rsp_prod
        ring.advertise()

    def collect(self) -> None:
        """Append what the view has for the kernel to its stream."""
        if self.conn.out:
            self.queue += b"".join(self.conn.out)
            self.conn.out.clear()

    def serve(self, journal: Journal | None) -> float:
        """Move and answer what is there; seconds until the next call is due, < 0: at an event.

        OSError: the journal could not be written, nothing was taken.
        """
        if self.dead:
            if self.ring.reconnecting:
                self._reset(journal)
            return -1
        if self.ring.reconnecting:
            self._reset(journal)
        worked = False
        for _ in range(ROUNDS):
            try:
                moved = self._move(journal)
            except RingError as error:
                self._fail(ERROR_RINGIDX, str(error))
                return -1
            if not moved:
                return GUARD if worked or self.queue or self.decoder.pending else -1
            worked = True
            self.channel.notify()
        return 0

    def _move(self, journal: Journal | None) -> bool:
        ring = self.ring
        data = ring.received()
        if data:
            cons = (self.cons + len(data)) & _U32
            if journal is not None:
                journal.append(RECORD.pack(FROM_KERNEL, cons) + data)
            self.cons = cons
            ring.consume(len(data))
            self._take(data)
            if self.decoder.bad:
                self._fail(ERROR_PROTO, f"a request of {self.decoder.bad[3]} bytes")
                return False
        self.collect()
        sent = ring.send(self.queue) if self.queue else 0
        if sent:
            del self.queue[:sent]
            self.prod = ring.rsp_prod
        return bool(data or sent)

    def _take(self, data: bytes) -> None:
        for message in self.decoder.feed(data):
            handle(self.store, self.conn, message)

    def _fail(self, code: int, why: str) -> None:
        """Stop serving the kernel, as docs/misc/xenstore-ring.txt has it."""
        self.dead = why
        self.store.log(f"{self.name} is corrupt, it is no longer served: {why}")
        self.ring.fail(code)
        self.store.reset(self.conn)
        self._silence()
        self.channel.notify()

    def _reset(self, journal: Journal | None) -> None:
        """Start over with an empty ring, because the kernel asks for it."""
        self.store.log(f"{self.name}: the peer reconnects, without watches and transactions")
        if journal is not None:
            journal.append(self.reset_record)
        self._forget()
        self.ring.empty()
        self.ring.connected()
        self.channel.notify()

    def _forget(self) -> None:
        self.store.reset(self.conn)
        self._silence()
        self.decoder = Decoder()
        self.cons = self.prod = 0
        self.dead = ""

    def _silence(self) -> None:
        """Drop what is not yet published."""
        self.conn.out.clear()
        self.queue.clear()
