"""The XenStore requests, each a function from a store view and a payload to a reply's payload.

Semantics and error names follow docs/misc/xenstore.txt and tools/xenstored (core.c, watch.c,
transaction.c, domain.c). Unlike it, a store here does not ask the hypervisor which domains exist.
"""

from __future__ import annotations

from noxs import wire
from noxs.wire import (
    DOMID_SELF,
    ERROR,
    HEADER,
    PAYLOAD_MAX,
    PERM_READ,
    WATCH,
    StoreError,
    canonical,
    one_string,
    parse_domid,
    strings,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from noxs.store import Connection, Store
    from noxs.tree import Transaction

    Handler = Callable[[Store, Connection, Transaction | None, bytes], bytes]

OK = b"OK\0"
INTRODUCED = b"@introduceDomain"
RELEASED = b"@releaseDomain"


def handle(store: Store, conn: Connection, message: wire.Message) -> None:
    """Answer one request: the reply and the events go to the connections' ``out``."""
    op, req_id, tx_id, payload = message
    try:
        reply = _reply(store, conn, op, tx_id, payload)
    except StoreError as error:
        op = ERROR
        reply = error.name + b"\0"
    except Exception as error:  # noqa: BLE001 - a journal would bring it back at every start
        store.log(f"request {op}, a bug: {error!r}")
        op = ERROR
        reply = b"EIO\0"
    store.touched.add(conn)
    conn.out.append(HEADER.pack(op, req_id, tx_id, len(reply)) + reply)
    if op == WATCH:
        watch = next(reversed(conn.watches.values()))
        store.emit(watch, watch.path)


def refuse(store: Store, conn: Connection, message: wire.Message, name: bytes) -> None:
    """Answer a request with an error, and do nothing."""
    _, req_id, tx_id, _ = message
    store.touched.add(conn)
    conn.out.append(HEADER.pack(ERROR, req_id, tx_id, len(name) + 1) + name + b"\0")


def _reply(store: Store, conn: Connection, op: int, tx_id: int, payload: bytes) -> bytes:
    handler = HANDLERS.get(op)
    if handler is None:
        raise StoreError(b"ENOSYS")
    store.asked[op] = store.asked.get(op, 0) + 1
    if not conn.privileged and op in PRIVILEGED:
        raise StoreError(b"EACCES")
    tx = None
    if tx_id and op not in WITHOUT_TRANSACTION:
        tx = conn.transactions.get(tx_id)
        if tx is None:
            raise StoreError(b"ENOENT")
    reply = handler(store, conn, tx, payload)
    if len(reply) > PAYLOAD_MAX:
        raise StoreError(b"E2BIG")
    return reply


# Requests: nodes


def _read(store: Store, conn: Connection, tx: Transaction | None, payload: bytes) -> bytes:
    if tx is None and conn.privileged and payload[:1] == b"/" and payload[-1] == 0:
        node = store.tree.nodes.get(payload[:-1])
        if node is not None:
            return node.value
    path = canonical(one_string(payload), conn.base)
    return store.tree.lookup(conn, tx, path, PERM_READ).value


def _write(store: Store, conn: Connection, tx: Transaction | None, payload: bytes) -> bytes:
    end = payload.find(b"\0")
    if end < 0:
        raise StoreError(b"EINVAL")
    path = payload[:end]
    if path[:1] != b"/" or path not in store.tree.nodes:
        path = canonical(path, conn.base)
    store.tree.write(conn, tx, path, payload[end + 1 :])
    if tx is None:
        store.fire(path)
    else:
        tx.note(path, exact=False)
    return OK


def _mkdir(store: Store, conn: Connection, tx: Transaction | None, payload: bytes) -> bytes:
    path = canonical(one_string(payload), conn.base)
    if store.tree.mkdir(conn, tx, path):
        store.announce(tx, [(path, False, None, None)])
    return OK


def _rm(store: Store, conn: Connection, tx: Transaction | None, payload: bytes) -> bytes:
    path = canonical(one_string(payload), conn.base)
    store.announce(tx, store.tree.remove(conn, tx, path))
    return OK


def _directory(store: Store, conn: Connection, tx: Transaction | None, payload: bytes) -> bytes:
    path = canonical(one_string(payload), conn.base)
    return store.tree.lookup(conn, tx, path, PERM_READ).child_names()


def _directory_part(
    store: Store, conn: Connection, tx: Transaction | None, payload: bytes
) -> bytes:
    if payload.count(b"\0") != 2:
        raise StoreError(b"EINVAL")
    path, offset = strings(payload)
    node = store.tree.lookup(conn, tx, canonical(path, conn.base), PERM_READ)
    generation = b"%d\0" % node.generation
    names = node.child_names()
    start = int(offset) if offset.isdigit() and len(offset) < 10 else 0
    if start >= len(names):
        return generation + b"\0"
    room = PAYLOAD_MAX - len(generation) - 1
    if len(names) - start <= room:
        return generation + names[start:] + b"\0"
    return generation + names[start : names.rindex(b"\0", start, start + room) + 1]


def _get_perms(store: Store, conn: Connection, tx: Transaction | None, payload: bytes) -> bytes:
    path = canonical(one_string(payload), conn.base, special=True)
    return wire.format_perms(store.tree.lookup(conn, tx, path, PERM_READ).perms)


def _set_perms(store: Store, conn: Connection, tx: Transaction | None, payload: bytes) -> bytes:
    path, *entries = strings(payload) or [b""]
    if not entries:
        raise StoreError(b"EINVAL")
    perms = wire.parse_perms(entries)
    path = canonical(path, conn.base, special=True)
    before = store.tree.set_perms(conn, tx, path, perms)
    store.announce(tx, [(path, False, None, before)])
    return OK


# Requests: watches and transactions


def _watch(store: Store, conn: Connection, _tx: Transaction | None, payload: bytes) -> bytes:
    args = strings(payload)
    if len(args) != 2:
        raise StoreError(b"EINVAL")
    store.add_watch(conn, args[0], args[1])
    return OK


def _unwatch(store: Store, conn: Connection, _tx: Transaction | None, payload: bytes) -> bytes:
    args = strings(payload)
    if len(args) != 2:
        raise StoreError(b"EINVAL")
    key = (canonical(args[0], conn.base, special=True), args[1])
    if key not in conn.watches:
        raise StoreError(b"ENOENT")
    store.drop_watch(conn.watches.pop(key))
    return OK


def _reset_watches(
    store: Store, conn: Connection, _tx: Transaction | None, _payload: bytes
) -> bytes:
    store.reset(conn)
    return OK


def _start(store: Store, conn: Connection, tx: Transaction | None, _payload: bytes) -> bytes:
    if tx is not None:
        raise StoreError(b"EBUSY")
    if not conn.privileged and len(conn.transactions) >= conn.quota.transactions:
        raise StoreError(b"ENOSPC")
    while conn.next_tx in conn.transactions or not conn.next_tx:
        conn.next_tx = (conn.next_tx + 1) & 0xFFFFFFFF
    ident = conn.next_tx
    conn.next_tx = (conn.next_tx + 1) & 0xFFFFFFFF
    conn.transactions[ident] = store.tree.begin(conn)
    return b"%d\0" % ident


def _end(store: Store, conn: Connection, tx: Transaction | None, payload: bytes) -> bytes:
    if payload not in {b"T\0", b"F\0"}:
        raise StoreError(b"EINVAL")
    if tx is None:
        raise StoreError(b"ENOENT")
    conn.transactions = {i: t for i, t in conn.transactions.items() if t is not tx}
    if payload == b"F\0":
        store.tree.abort(tx)
    else:
        store.announce(None, store.tree.commit(conn, tx))
    return OK


# Requests: domains


def _introduce(store: Store, _conn: Connection, _tx: Transaction | None, payload: bytes) -> bytes:
    args = strings(payload)
    if len(args) < 3 or not args[2].isdigit() or not int(args[2]):
        raise StoreError(b"EINVAL")
    domid = parse_domid(args[0])
    if domid not in store.introduced:
        store.introduced.add(domid)
        store.fire(INTRODUCED)
    return OK


def _release(store: Store, _conn: Connection, _tx: Transaction | None, payload: bytes) -> bytes:
    domid = _introduced_domid(store, payload)
    store.introduced.discard(domid)
    store.announce(None, store.tree.drop_owner(domid))
    store.fire(RELEASED)
    return OK


def _introduced_domid(store: Store, payload: bytes) -> int:
    domid = parse_domid(one_string(payload))
    if not domid:
        raise StoreError(b"EINVAL")
    if domid not in store.introduced:
        raise StoreError(b"ENOENT")
    return domid


def _resume(store: Store, _conn: Connection, _tx: Transaction | None, payload: bytes) -> bytes:
    _introduced_domid(store, payload)
    return OK


def _set_target(store: Store, _conn: Connection, _tx: Transaction | None, payload: bytes) -> bytes:
    args = strings(payload)
    if len(args) < 2:
        raise StoreError(b"EINVAL")
    domid, target = parse_domid(args[0]), parse_domid(args[1])
    if not {domid, target} <= store.introduced:
        raise StoreError(b"ENOENT")
    for conn in store.connections.values():
        if conn.domid == domid and not conn.privileged:
            conn.target = target
    return OK


def _domain_path(
    _store: Store, _conn: Connection, _tx: Transaction | None, payload: bytes
) -> bytes:
    return b"/local/domain/%d\0" % parse_domid(one_string(payload))


def _is_introduced(
    store: Store, _conn: Connection, _tx: Transaction | None, payload: bytes
) -> bytes:
    domid = parse_domid(one_string(payload))
    return b"T\0" if domid == DOMID_SELF or domid in store.introduced else b"F\0"


def _control(store: Store, _conn: Connection, _tx: Transaction | None, payload: bytes) -> bytes:
    command = strings(payload)
    if command == [b"help"]:
        return b"check\ncount\nhelp\nprint <string>\n\0"
    if command == [b"count"]:
        asked = store.asked.items()
        return "".join(f"{wire.NAMES[op]} {number}\n" for op, number in asked).encode() + b"\0"
    if command == [b"check"]:
        try:
            store.tree.check()
        except AssertionError as error:
            store.log(f"the store is inconsistent: {error}")
            raise StoreError(b"EIO") from error
        return OK
    if len(command) == 2 and command[0] == b"print":
        store.log("control: " + command[1].decode("ascii", "backslashreplace"))
        return OK
    raise StoreError(b"EINVAL")


HANDLERS: dict[int, Handler] = {
    wire.CONTROL: _control,
    wire.DIRECTORY: _directory,
    wire.READ: _read,
    wire.GET_PERMS: _get_perms,
    wire.WATCH: _watch,
    wire.UNWATCH: _unwatch,
    wire.TRANSACTION_START: _start,
    wire.TRANSACTION_END: _end,
    wire.INTRODUCE: _introduce,
    wire.RELEASE: _release,
    wire.GET_DOMAIN_PATH: _domain_path,
    wire.WRITE: _write,
    wire.MKDIR: _mkdir,
    wire.RM: _rm,
    wire.SET_PERMS: _set_perms,
    wire.IS_DOMAIN_INTRODUCED: _is_introduced,
    wire.RESUME: _resume,
    wire.SET_TARGET: _set_target,
    wire.RESET_WATCHES: _reset_watches,
    wire.DIRECTORY_PART: _directory_part,
}
WITHOUT_TRANSACTION = frozenset({wire.WATCH, wire.UNWATCH})
PRIVILEGED = frozenset({
    wire.CONTROL, wire.INTRODUCE, wire.RELEASE, wire.IS_DOMAIN_INTRODUCED, wire.RESUME,
    wire.SET_TARGET,
})  # fmt: skip
