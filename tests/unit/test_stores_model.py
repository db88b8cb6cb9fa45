"""A guest's store through its ring, against a dictionary: random requests in random pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stores_host import Host

from noxs import wire

if TYPE_CHECKING:
    import pytest

BASE = b"/local/domain/5"
names = st.sampled_from([b"a", b"b", b"c"])
own = st.lists(names, max_size=3).map(lambda parts: b"/".join([b"data", *parts]))
foreign = st.sampled_from([
    b"/local/domain/6/data/a", b"/local/domain/0/x", b"/local/domain/0/backend/vif/6/0/state",
    b"memory/target", b"/vm/x", b"/x", b"name/x", b"/local/domain/50/data", b"cpu/0",
])  # fmt: skip
operations = st.one_of(
    st.tuples(st.just(wire.WRITE), own, st.binary(max_size=5)),
    st.tuples(st.sampled_from([wire.READ, wire.MKDIR, wire.RM, wire.DIRECTORY]), own, st.just(b"")),
    st.tuples(st.sampled_from([wire.READ, wire.WRITE, wire.MKDIR, wire.RM]), foreign, st.just(b"")),
)


class Model:
    """What a guest's own part of its view holds, by absolute path."""

    def __init__(self) -> None:
        self.nodes: dict[bytes, bytes] = {BASE + b"/data": b""}

    def answer(self, op: int, path: bytes, value: bytes) -> Any:
        if not path.startswith(b"data"):
            readable = op == wire.READ and not path.startswith(b"/")
            return b"ENOENT\0" if readable else b"EACCES\0"
        path = BASE + b"/" + path
        if op in {wire.WRITE, wire.MKDIR}:
            return self.make(op, path, value)
        if op == wire.RM:
            return self.remove(path)
        if path not in self.nodes:
            return b"ENOENT\0"
        if op == wire.READ:
            return self.nodes[path]
        below = (p[len(path) + 1 :] for p in self.nodes if p.startswith(path + b"/"))
        return {name for name in below if b"/" not in name}

    def make(self, op: int, path: bytes, value: bytes) -> bytes:
        if op == wire.WRITE:
            self.nodes[path] = value
        while path.count(b"/") > 4:
            self.nodes.setdefault(path, b"")
            path = wire.parent(path)
        self.nodes.setdefault(path, b"")
        return b"OK\0"

    def remove(self, path: bytes) -> bytes:
        if path not in self.nodes:
            # Above "data" is a node that the guest may only read.
            if wire.parent(path) == BASE:
                return b"EACCES\0"
            return b"OK\0" if wire.parent(path) in self.nodes else b"ENOENT\0"
        for other in [p for p in self.nodes if p == path or p.startswith(path + b"/")]:
            del self.nodes[other]
        return b"OK\0"


def shown(op: int, body: bytes) -> Any:
    plain = op == wire.DIRECTORY and body not in {b"ENOENT\0", b"EACCES\0"}
    return set(wire.strings(body)) if plain else body


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(operations, max_size=30), st.lists(st.integers(1, 700), min_size=1, max_size=20))
def test_a_guest_s_requests_in_pieces(
    tmp_path_factory: pytest.TempPathFactory, sequence: Any, pieces: list[int]
) -> None:
    host = Host(tmp_path_factory.mktemp("host"), journal=False)
    guest, model = host.guest(5), Model()
    # A removed "data" cannot be made again by the guest: in the model neither.
    script = [each for each in sequence if each[:2] != (wire.RM, b"data")]
    wanted = [model.answer(*each) for each in script]
    for op, path, value in script:
        guest.send(op, path + b"\0" + value)
    stream, guest.peer.to_send = guest.peer.to_send, b""
    got: list[Any] = []
    turn = 0
    while len(got) < len(script):
        size = pieces[turn % len(pieces)]
        guest.peer.to_send += stream[:size]
        stream = stream[size:]
        guest.peer.step()
        host.turn(0.01)
        got += [shown(script[number - 1][0], body) for _, number, _, body in guest.receive()]
        turn += 1
        assert turn < 10000
    assert got == wanted
    tree = host.stores.guests[5].store.tree
    tree.check()
    held = {p: n.value for p, n in tree.nodes.items() if p.startswith(BASE + b"/data")}
    assert held == model.nodes


transactions = st.lists(
    st.one_of(
        st.tuples(st.just("guest"), own, st.binary(max_size=3)),
        st.tuples(st.just("tool"), own, st.binary(max_size=3)),
        st.tuples(st.just("read"), own, st.just(b"")),
    ),
    max_size=12,
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(transactions)
def test_a_transaction_is_all_or_nothing(
    tmp_path_factory: pytest.TempPathFactory, sequence: Any
) -> None:
    """It commits unless the toolstack has changed what it saw; then nothing of it is there."""
    host = Host(tmp_path_factory.mktemp("host"), journal=False)
    guest = host.guest(5)
    served = host.stores.guests[5]
    assert guest.ask(wire.TRANSACTION_START, b"\0") == [b"1\0"]
    inside: dict[bytes, bytes] = {}
    outside: dict[bytes, bytes] = {}
    for who, path, value in sequence:
        full = BASE + b"/" + path
        if who == "tool":
            served.write(full, value)
            outside[full] = value
        elif who == "guest":
            assert guest.write(path, value, tx=1) == [b"OK\0"]
            inside[full] = value
        else:
            body = guest.read(path, tx=1)
            if full in inside:
                assert body == inside[full]
    (reply,) = guest.ask(wire.TRANSACTION_END, b"T\0", tx=1)
    assert reply in {b"OK\0", b"EAGAIN\0"}
    if reply == b"EAGAIN\0":
        assert outside, "a conflict with nobody"
        inside.clear()
    wanted = {**outside, **inside}
    for path, value in wanted.items():
        assert served.store.tree.nodes[path].value == value
    made = [p for p in served.store.tree.nodes if p.startswith(BASE + b"/data/")]
    assert all(any(w == p or w.startswith(p + b"/") for w in wanted) for p in made)
    served.store.tree.check()
