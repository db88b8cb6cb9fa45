"""The nodes of a store, with permissions, quotas and transactions; no connections, no I/O.

A ``Tree`` is one flat dictionary from absolute path to ``Node``. Each view (Dom0's bus, and one
private store per stock guest) is a tree of its own: nothing is shared between views.

Errors and conflict rules are those of C xenstored (tools/xenstored/core.c, transaction.c): every
change gives a node a new generation, creating or removing a child changes its parent too, and a
commit succeeds if no node that the transaction accessed has another generation than when it was
first accessed. A transaction sees each node as it was then; nodes that others changed in between
may not fit together, which is why such a transaction must not, and cannot, commit.
"""

from __future__ import annotations

from noxs.wire import (
    PERM_NONE,
    PERM_OWNER,
    PERM_READ,
    PERM_WRITE,
    Perms,
    StoreError,
    parent,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = b"/"
ABSENT = -1
"""The generation of a node that does not exist."""
ACCESS_SIZE = 64
"""Bytes that a transaction keeps of a node that it accessed, beside path and value."""


class Quota:
    """What one unprivileged caller may use; the defaults are xenstored's (domain.c, quotas[]).

    Two are not: ``transaction_size``, the bytes that a transaction keeps of what it accessed, times
    ``transactions`` is ``memory``, the bytes that xenstored allows for all that a guest makes it
    keep; and ``request_rate`` is per second.
    """

    __slots__ = (
        "memory",
        "node_size",
        "nodes",
        "outstanding",
        "perms",
        "request_rate",
        "transaction_nodes",
        "transaction_size",
        "transactions",
        "watches",
    )

    def __init__(
        self,
        *,
        nodes: int = 1000,
        node_size: int = 2048,
        watches: int = 128,
        transactions: int = 10,
        transaction_nodes: int = 1024,
        perms: int = 5,
        outstanding: int = 20,
        transaction_size: int = 1 << 18,
        memory: int = 2560 << 10,
        request_rate: int = 1000,
    ) -> None:
        self.memory = memory
        self.nodes = nodes
        self.node_size = node_size
        self.watches = watches
        self.transactions = transactions
        self.transaction_nodes = transaction_nodes
        self.perms = perms
        self.outstanding = outstanding
        self.transaction_size = transaction_size
        self.request_rate = request_rate


class Caller:
    """Who asks: a domain, what it targets (SET_TARGET), and its quota unless privileged."""

    __slots__ = ("domid", "privileged", "quota", "target")

    def __init__(self, domid: int, *, privileged: bool, quota: Quota | None = None) -> None:
        self.domid = domid
        self.privileged = privileged
        self.quota = quota or Quota()
        self.target = ABSENT

    def rights(self, perms: Perms) -> int:
        """The PERM_* bits that these permissions give the caller."""
        if self.privileged or perms[0][0] in (self.domid, self.target):
            return PERM_READ | PERM_WRITE | PERM_OWNER
        for domid, mask in perms[1:]:
            if domid in (self.domid, self.target):
                return mask
        return perms[0][1]


class Node:
    """A value, permissions, the names of the children in order of creation, a generation."""

    __slots__ = ("children", "generation", "perms", "value")

    def __init__(
        self,
        value: bytes,
        perms: Perms,
        children: dict[bytes, None] | None = None,
        generation: int = 0,
    ) -> None:
        self.value = value
        self.perms = perms
        self.children = children
        self.generation = generation

    def copy(self) -> Node:
        """A node that may change without changing this one."""
        children = dict(self.children) if self.children else None
        return Node(self.value, self.perms, children, self.generation)

    def child_names(self) -> bytes:
        """The reply to DIRECTORY."""
        return b"\0".join(self.children) + b"\0" if self.children else b""


class Transaction:
    """What a transaction accessed and changed, in order of first access.

    ``first`` has the generation and the permissions of each accessed node as first seen, ``nodes``
    the node as the transaction sees it (None: absent), ``own`` the paths that it changed, ``fire``
    the changes to announce at commit (True: the exact path only), ``delta`` the change in the
    number of nodes per owner. ``failed`` means that the commit must fail. ``limit`` bounds the
    accessed nodes, ``room`` is left for them and for what is written, in bytes.
    """

    __slots__ = ("created", "delta", "failed", "fire", "first", "limit", "nodes", "own", "room")

    def __init__(self, limit: int, room: int = 1 << 40) -> None:
        self.room = room
        self.first: dict[bytes, tuple[int, Perms | None]] = {}
        self.nodes: dict[bytes, Node | None] = {}
        self.own: set[bytes] = set()
        self.fire: dict[bytes, bool] = {}
        self.delta: dict[int, int] = {}
        self.limit = limit
        self.created = False
        self.failed = False

    def keep(self, size: int) -> None:
        """Count bytes that the transaction keeps. ENOSPC when they are too many."""
        self.room -= size
        if self.room < 0:
            self.failed = True
            raise StoreError(b"ENOSPC")

    def note(self, path: bytes, *, exact: bool) -> None:
        """Announce a change at commit; a change of the subtree outweighs one of the exact path."""
        self.fire[path] = exact and self.fire.get(path, True)


Change = tuple[bytes, bool, "Node | None", "Perms | None"]
"""An announced change: path, exact path only, the node if it is at hand, former permissions."""


class Tree:
    """One store's nodes.

    Methods take the caller and its transaction (or None), raise StoreError, and return what there
    is to announce to watchers; what is changed in a transaction is announced when it is committed.
    """

    def __init__(self) -> None:
        everyone_out: Perms = ((0, PERM_NONE),)
        self.generation = 0
        self.owned: dict[int, int] = {0: 3}
        self.open: set[Transaction] = set()
        self.nodes: dict[bytes, Node] = {
            ROOT: Node(b"", everyone_out),
            b"@introduceDomain": Node(b"", everyone_out),
            b"@releaseDomain": Node(b"", everyone_out),
        }

    # Access

    def get(self, tx: Transaction | None, path: bytes) -> Node | None:
        """The node as the transaction sees it; an access is noted in the transaction."""
        if tx is None:
            return self.nodes.get(path)
        if path in tx.nodes:
            return tx.nodes[path]
        if len(tx.nodes) >= tx.limit:
            tx.failed = True
            raise StoreError(b"ENOSPC")
        node = self.nodes.get(path)
        tx.keep(ACCESS_SIZE + len(path) + (len(node.value) if node else 0))
        tx.nodes[path] = node
        tx.first[path] = (node.generation, node.perms) if node else (ABSENT, None)
        return node

    def lookup(self, who: Caller, tx: Transaction | None, path: bytes, need: int) -> Node:
        """The node, if the caller has the rights; EACCES or ENOENT otherwise."""
        node = self.get(tx, path)
        if node is None:
            raise StoreError(self._why_absent(who, tx, path, need))
        if not who.privileged and who.rights(node.perms) & need != need:
            self._why_absent(who, tx, path, need)
            raise StoreError(b"EACCES")
        return node

    def _why_absent(self, who: Caller, tx: Transaction | None, path: bytes, need: int) -> bytes:
        """ENOENT only for those whom the nearest existing node above gives a right."""
        node = None
        while node is None:
            path = parent(path)
            node = self.get(tx, path)
        return b"ENOENT" if who.rights(node.perms) & need else b"EACCES"

    def _own(self, tx: Transaction | None, path: bytes, node: Node) -> Node:
        """The node in a form that may be changed, with a new generation."""
        self.generation += 1
        if tx is None:
            if self.open:
                for other in self.open:
                    if other.nodes.get(path) is node and path not in other.own:
                        other.nodes[path] = node.copy()
        elif path not in tx.own:
            node = node.copy()
            tx.nodes[path] = node
            tx.own.add(path)
        node.generation = self.generation
        return node

    def _count(self, tx: Transaction | None, domid: int, delta: int) -> None:
        counts = self.owned if tx is None else tx.delta
        counts[domid] = counts.get(domid, 0) + delta
        if tx is None and not counts[domid]:
            del counts[domid]

    def _check_size(
        self, who: Caller, tx: Transaction | None, node: Node, value: int, name: int = 0
    ) -> None:
        """ENOSPC unless the node may hold ``value`` bytes and one more child's ``name`` bytes."""
        # sizeof(struct node_hdr) is 16, a permission entry takes 8 (xenstored's core.h).
        names = sum(map(len, node.children)) + len(node.children) if node.children else 0
        if 16 + 8 * len(node.perms) + value + names + name > who.quota.node_size:
            if tx is not None:
                tx.failed = True
            raise StoreError(b"ENOSPC")

    # Changes

    def write(self, who: Caller, tx: Transaction | None, path: bytes, value: bytes) -> None:
        """Set a value; creates the node and those above it as needed."""
        node = self.get(tx, path)
        if node is None:
            why = self._why_absent(who, tx, path, PERM_WRITE)
            if why != b"ENOENT":
                raise StoreError(why)
            self._create(who, tx, path, value)
            return
        if not who.privileged:
            if not who.rights(node.perms) & PERM_WRITE:
                self._why_absent(who, tx, path, PERM_WRITE)
                raise StoreError(b"EACCES")
            self._check_size(who, tx, node, len(value))
        if tx is not None:
            tx.keep(len(value))
        self._own(tx, path, node).value = value

    def mkdir(self, who: Caller, tx: Transaction | None, path: bytes) -> bool:
        """Create an empty node unless it exists; whether it was created."""
        node = self.get(tx, path)
        if node is not None:
            self.lookup(who, tx, path, PERM_WRITE)
            return False
        why = self._why_absent(who, tx, path, PERM_WRITE)
        if why != b"ENOENT":
            raise StoreError(why)
        self._create(who, tx, path, b"")
        return True

    def _create(self, who: Caller, tx: Transaction | None, path: bytes, value: bytes) -> None:
        missing = [path]
        above = parent(path)
        node = self.get(tx, above)
        while node is None:
            missing.append(above)
            above = parent(above)
            node = self.get(tx, above)
        perms = node.perms
        if not who.privileged:
            perms = ((who.domid, perms[0][1]), *perms[1:])
            held = self.owned.get(who.domid, 0) + (tx.delta.get(who.domid, 0) if tx else 0)
            if held + len(missing) > who.quota.nodes:
                if tx is not None and held < who.quota.nodes:
                    tx.failed = True
                raise StoreError(b"ENOSPC")
            self._check_size(who, tx, Node(b"", perms), len(value))
            self._check_size(who, tx, node, len(node.value), len(missing[-1]) - len(above) + 1)
        if tx is not None:
            tx.keep(len(value))
        node = self._own(tx, above, node)
        for name in reversed(missing):
            if node.children is None:
                node.children = {}
            node.children[name[name.rfind(b"/") + 1 :]] = None
            self.generation += 1
            node = Node(b"", perms, None, self.generation)
            if tx is None:
                self.nodes[name] = node
            else:
                tx.nodes[name] = node
                tx.own.add(name)
                tx.created = True
        node.value = value
        self._count(tx, perms[0][0], len(missing))

    def remove(self, who: Caller, tx: Transaction | None, path: bytes) -> list[Change]:
        """Remove a node and all below it; the changes, deepest first, the node itself last."""
        node = self.get(tx, path)
        if node is None:
            why = self._why_absent(who, tx, path, PERM_WRITE)
            if why == b"ENOENT" and self.get(tx, parent(path)) is not None:
                return []
            raise StoreError(why)
        self.lookup(who, tx, path, PERM_WRITE)
        if path == ROOT:
            raise StoreError(b"EINVAL")
        return self._drop(tx, path)

    def _drop(self, tx: Transaction | None, path: bytes) -> list[Change]:
        above = self.get(tx, parent(path))
        if above is None:
            raise StoreError(b"EINVAL")  # seen at different times; the commit will fail
        changes: list[Change] = [(p, p != path, n, None) for p, n in self.walk(tx, path)]
        for name, _, node, _ in changes:
            assert node is not None
            self._count(tx, node.perms[0][0], -1)
            if tx is None:
                del self.nodes[name]
            else:
                tx.nodes[name] = None
                tx.own.add(name)
        self.generation += len(changes)
        above = self._own(tx, parent(path), above)
        name = path[path.rfind(b"/") + 1 :]
        if above.children is None or name not in above.children:
            raise StoreError(b"EIO")  # as above
        del above.children[name]
        return changes

    def walk(self, tx: Transaction | None, path: bytes) -> Iterator[tuple[bytes, Node]]:
        """A node and all below it, children before their parents."""
        stack: list[tuple[bytes, Node | None]] = [(path, None)]
        while stack:
            name, node = stack.pop()
            if node is not None:
                yield name, node
                continue
            node = self.get(tx, name)
            if node is None:
                assert tx is not None, name
                continue
            if not node.children:
                yield name, node
                continue
            stack.append((name, node))
            prefix = name + b"/" if name != ROOT else name
            stack.extend((prefix + child, None) for child in reversed(node.children))

    def set_perms(self, who: Caller, tx: Transaction | None, path: bytes, perms: Perms) -> Perms:
        """Replace the permissions; the former ones. Only the privileged give a node away."""
        if not who.privileged and len(perms) > who.quota.perms:
            raise StoreError(b"ENOSPC")
        node = self.lookup(who, tx, path, PERM_WRITE | PERM_OWNER)
        before = node.perms
        if perms[0][0] != before[0][0]:
            if not who.privileged:
                raise StoreError(b"EPERM")
            self._count(tx, before[0][0], -1)
            self._count(tx, perms[0][0], 1)
        self._own(tx, path, node).perms = perms
        return before

    def drop_owner(self, domid: int) -> list[Change]:
        """Remove all nodes that a gone domain owns, with everything below them."""
        changes: list[Change] = []
        if self.owned.get(domid):
            for path in [p for p, n in self.nodes.items() if n.perms[0][0] == domid]:
                if path in self.nodes and path[:1] == ROOT and path != ROOT:
                    changes += self._drop(None, path)
        return changes

    # Transactions

    def begin(self, who: Caller) -> Transaction:
        """Open a transaction; it must be given to ``commit`` or ``abort``."""
        quota = who.quota
        tx = Transaction(
            *(
                (1 << 30, 1 << 40)
                if who.privileged
                else (quota.transaction_nodes, quota.transaction_size)
            )
        )
        self.generation += 1
        self.open.add(tx)
        return tx

    def abort(self, tx: Transaction) -> None:
        """Forget a transaction."""
        self.open.discard(tx)

    def commit(self, who: Caller, tx: Transaction) -> list[Change]:
        """Make a transaction's changes, all or none; what to announce.

        EAGAIN on a conflict, ENOSPC when an owner's quota does not hold them, ENOMEM (as in
        xenstored) when one of its requests failed half way.
        """
        self.open.discard(tx)
        self._check_commit(who, tx)
        nodes = self.nodes
        for path in tx.first:
            if path in tx.own:
                node = tx.nodes[path]
                self.generation += 1
                if node is None:
                    nodes.pop(path, None)
                else:
                    node.generation = self.generation
                    nodes[path] = node
        for domid, delta in tx.delta.items():
            self._count(None, domid, delta)
        return [
            (path, tx.fire[path], nodes.get(path), perms)
            for path, (_, perms) in tx.first.items()
            if path in tx.fire and (perms or path in nodes)
        ]

    def _check_commit(self, who: Caller, tx: Transaction) -> None:
        if tx.failed:
            raise StoreError(b"ENOMEM")
        if tx.created and not who.privileged:
            for domid, delta in tx.delta.items():
                if delta > 0 and self.owned.get(domid, 0) + delta > who.quota.nodes:
                    raise StoreError(b"ENOSPC")
        for path, (generation, _) in tx.first.items():
            node = self.nodes.get(path)
            if (node.generation if node else ABSENT) != generation:
                raise StoreError(b"EAGAIN")

    def check(self) -> None:
        """Raise AssertionError unless every node is named by its parent and counted."""
        seen = dict(self.walk(None, ROOT))
        specials = {path: node for path, node in self.nodes.items() if path[:1] == b"@"}
        assert seen.keys() | specials.keys() == self.nodes.keys()
        counts: dict[int, int] = {}
        for node in self.nodes.values():
            counts[node.perms[0][0]] = counts.get(node.perms[0][0], 0) + 1
        assert counts == self.owned
