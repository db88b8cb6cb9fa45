"""One store view: a tree, the connections that use it and their watches; no I/O.

``requests.handle`` answers one request on a view: it appends the encoded reply and the events it
causes to the ``out`` lists of the connections concerned, which are added to ``touched``; whoever
owns the transport takes them from there. Equal sequences of requests give equal outputs: noxsd's
journal rests on that.
"""

from __future__ import annotations

from noxs.tree import Caller, Change, Quota, Transaction, Tree
from noxs.wire import (
    HEADER,
    PAYLOAD_MAX,
    PERM_READ,
    WATCH_EVENT,
    StoreError,
    canonical,
    parent,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from noxs.tree import Node
    from noxs.wire import Perms

FIRST_TX = 1
"""The number of a connection's first transaction."""
MANY = 8
"""Watches for one change, above which those of full connections are sorted out first."""


class Watch:
    """A registered watch; ``skip`` bytes of an event's path are left out for a relative one."""

    __slots__ = ("conn", "order", "path", "skip", "token")

    def __init__(self, conn: Connection, path: bytes, token: bytes, skip: int) -> None:
        self.conn = conn
        self.path = path
        self.token = token
        self.skip = skip
        self.order = (0, 0)


class Connection(Caller):
    """One client: a domain's ring or a socket. ``out`` holds encoded messages to be sent.

    ``ident`` is the server's number for it, ``base`` what relative paths start from.
    """

    __slots__ = ("base", "ident", "next_tx", "out", "transactions", "watches")

    def __init__(
        self, ident: int, domid: int = 0, *, privileged: bool = True, quota: Quota | None = None
    ) -> None:
        super().__init__(domid, privileged=privileged, quota=quota)
        self.ident = ident
        self.base = b"/local/domain/%d" % domid
        self.out: list[bytes] = []
        self.watches: dict[tuple[bytes, bytes], Watch] = {}
        self.transactions: dict[int, Transaction] = {}
        self.next_tx = FIRST_TX

    def push(self, event: bytes) -> None:
        """Take an encoded event to be sent."""
        self.out.append(event)

    def full(self) -> bool:
        """Whether no more events are taken for now: those that come are lost."""
        return False


class Store:
    """One store view and everything that is connected to it."""

    def __init__(self, log: Callable[[str], None] = lambda _message: None) -> None:
        self.tree = Tree()
        self.connections: dict[int, Connection] = {}
        self.touched: set[Connection] = set()
        self.introduced: set[int] = {0}
        self.watches: dict[bytes, list[Watch]] = {}
        self.watch_count = 0
        self.asked: dict[int, int] = {}
        """How many requests of each type there were."""
        self.log = log

    def connect(self, conn: Connection) -> None:
        """Add a connection; its ``ident`` must not be in use."""
        assert conn.ident not in self.connections
        self.connections[conn.ident] = conn

    def disconnect(self, conn: Connection) -> None:
        """Forget a connection with its watches, transactions and unsent output."""
        self.reset(conn)
        conn.out = []
        self.touched.discard(conn)
        del self.connections[conn.ident]

    def reset(self, conn: Connection) -> None:
        """Drop a connection's watches and transactions (RESET_WATCHES)."""
        for watch in conn.watches.values():
            self.drop_watch(watch)
        conn.watches.clear()
        for tx in conn.transactions.values():
            self.tree.abort(tx)
        conn.transactions.clear()

    # Watches

    def add_watch(self, conn: Connection, path: bytes, token: bytes) -> Watch:
        """Register a watch; ``path`` as the client sent it. EINVAL, EEXIST, ENOSPC."""
        full = canonical(path, conn.base, special=True)
        if (full, token) in conn.watches:
            raise StoreError(b"EEXIST")
        if not conn.privileged and len(conn.watches) >= conn.quota.watches:
            raise StoreError(b"ENOSPC")
        watch = Watch(conn, full, token, len(full) - len(path))
        self.watch_count += 1
        watch.order = (conn.ident, self.watch_count)
        conn.watches[full, token] = watch
        self.watches.setdefault(full, []).append(watch)
        return watch

    def drop_watch(self, watch: Watch) -> None:
        """Take a watch out of the index; its connection's table is the caller's business."""
        others = self.watches[watch.path]
        others.remove(watch)
        if not others:
            del self.watches[watch.path]

    def emit(self, watch: Watch, path: bytes) -> None:
        """Send one event, unless it is longer than a message may be."""
        body = b"%s\0%s\0" % (path[watch.skip :], watch.token)
        if len(body) <= PAYLOAD_MAX:
            watch.conn.push(HEADER.pack(WATCH_EVENT, 0, 0, len(body)) + body)
            self.touched.add(watch.conn)

    def fire(self, path: bytes, *, exact: bool = False, sight: Sight | None = None) -> None:
        """Send the events for one change: to watches of the path and, unless exact, above it.

        ``sight`` knows the changes announced together, this one included.
        """
        watches = self.watches
        found = watches.get(path, [])
        if not exact and path[0] == 0x2F:
            above = path
            while len(above) > 1:
                above = above[: above.rfind(b"/")] or b"/"
                if above in watches:
                    found = found + watches[above]
        if len(found) > MANY:
            found = [watch for watch in found if not watch.conn.full()]
        if len(found) > 1:
            # Two watches with one token get one event, as from send_event() in core.c.
            alike = {(watch.conn, watch.token, watch.skip): watch for watch in reversed(found)}
            found = sorted(alike.values(), key=_order)
        blind: set[Connection] = set()
        for watch in found:
            conn = watch.conn
            if conn in blind or conn.full():
                continue
            if not conn.privileged:
                sight = sight or Sight(self.tree)
                if not sight.permits(conn, path):
                    blind.add(conn)
                    continue
            self.emit(watch, path)

    def announce(self, tx: Transaction | None, changes: Sequence[Change]) -> None:
        """Send the events for several changes, or keep them for the commit."""
        sight = Sight(self.tree, changes)
        for path, exact, _, _ in changes:
            if tx is None:
                self.fire(path, exact=exact, sight=sight)
            else:
                tx.note(path, exact=exact)


class Sight:
    """What watchers may learn of changes that are announced together (watch_permitted()).

    The changes tell what a watcher was allowed to see before.
    """

    __slots__ = ("_before", "_changes", "_gone", "_last", "_tree")

    def __init__(self, tree: Tree, changes: Sequence[Change] = ()) -> None:
        self._tree = tree
        self._changes: Sequence[Change] | None = changes
        self._gone: dict[bytes, Node | None] = {}
        self._before: dict[bytes, Perms] = {}
        self._last: tuple[Connection | None, bytes, bool] = (None, b"", False)

    def permits(self, who: Connection, path: bytes) -> bool:
        """Whether a watcher may learn of the change of a node."""
        if self._last[:2] != (who, path):
            self._last = (who, path, self._permits(who, path))
        return self._last[2]

    def _permits(self, who: Connection, path: bytes) -> bool:
        if self._changes is not None:  # the privileged, for whom there is no question, are spared
            self._gone = {name: node for name, _, node, _ in self._changes}
            self._before = {name: perms for name, _, _, perms in self._changes if perms}
            self._changes = None
        before = self._before.get(path)
        if before and who.rights(before) & PERM_READ:
            return True
        for name in (path, parent(path)):
            node = self._tree.nodes.get(name) or self._gone.get(name)
            if node is None:
                return False
            if who.rights(node.perms) & PERM_READ:
                return True
        return False


def _order(watch: Watch) -> tuple[int, int]:
    return watch.order
