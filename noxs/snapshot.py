"""A store view as plain data and back, for noxsd's journal.

The data is marshalled in format 4, which every Python from 3.4 on reads: it lives no longer than
the boot, in a directory that only noxsd can write. Sockets die with the process: of their
connections only what the log since then refers to is kept, which is the transactions open at the
time and the number that the next one gets; their watches are not.
"""

from __future__ import annotations

import marshal

from noxs.store import FIRST_TX, Connection
from noxs.tree import Node, Transaction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from noxs.store import Store

FORMAT = 4
KERNEL = 0
"""The kernel's connection; sockets count from 1."""


def dump(store: Store, extra: dict[str, Any]) -> bytes:
    """The view's state, with ``extra`` (plain data) beside it."""
    tree = store.tree
    return marshal.dumps(
        {
            "extra": extra,
            "generation": tree.generation,
            "watch_count": store.watch_count,
            "introduced": sorted(store.introduced),
            "nodes": [(path, _freeze(node)) for path, node in tree.nodes.items()],
            "connections": [
                _freeze_connection(conn)
                for conn in store.connections.values()
                if conn.ident == KERNEL or conn.next_tx != FIRST_TX
            ],
        },
        FORMAT,
    )


def load(state: bytes) -> dict[str, Any]:
    """Dumped state for ``fill``, and under "extra" what was beside it."""
    data: dict[str, Any] = marshal.loads(state)  # noqa: S302 - noxsd's own directory
    return data


def fill(
    store: Store, data: dict[str, Any], make: Callable[[int], Connection] = Connection
) -> None:
    """Bring a new view to a loaded state; ``make`` makes a connection of a number."""
    tree = store.tree
    tree.generation = data["generation"]
    tree.nodes = {path: _thaw(node) for path, node in data["nodes"]}
    tree.owned = {}
    for node in tree.nodes.values():
        owner = node.perms[0][0]
        tree.owned[owner] = tree.owned.get(owner, 0) + 1
    store.introduced = set(data["introduced"])
    for ident, next_tx, watches, transactions in data["connections"]:
        conn = make(ident)
        store.connect(conn)
        conn.next_tx = next_tx
        for path, token, order in watches:
            store.add_watch(conn, path, token).order = order
        for tx_id, tx in transactions:
            conn.transactions[tx_id] = _thaw_transaction(tx)
            tree.open.add(conn.transactions[tx_id])
    store.watch_count = data["watch_count"]


def _freeze(node: Node) -> tuple[Any, ...]:
    return (node.value, node.perms, tuple(node.children or ()), node.generation)


def _thaw(data: tuple[Any, ...]) -> Node:
    value, perms, children, generation = data
    return Node(value, perms, dict.fromkeys(children) or None, generation)


def _freeze_connection(conn: Connection) -> tuple[Any, ...]:
    watches = []
    if conn.ident == KERNEL:
        watches = [(w.path[w.skip :], w.token, w.order) for w in conn.watches.values()]
    transactions = [(ident, _freeze_transaction(tx)) for ident, tx in conn.transactions.items()]
    return (conn.ident, conn.next_tx, watches, transactions)


def _freeze_transaction(tx: Transaction) -> tuple[Any, ...]:
    nodes = [(path, node and _freeze(node)) for path, node in tx.nodes.items()]
    return (
        tx.first,
        nodes,
        list(tx.own),
        tx.fire,
        tx.delta,
        tx.limit,
        tx.created,
        tx.failed,
        tx.room,
    )


def _thaw_transaction(data: tuple[Any, ...]) -> Transaction:
    first, nodes, own, fire, delta, limit, created, failed, *room = data
    tx = Transaction(limit, *room)
    tx.first, tx.own, tx.fire, tx.delta = first, set(own), fire, delta
    tx.nodes = {path: node and _thaw(node) for path, node in nodes}
    tx.created, tx.failed = created, failed
    return tx
