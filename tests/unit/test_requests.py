"""The requests as a client sees them: replies, errors, events, and their order."""

import gc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noxs import wire
from noxs.requests import HANDLERS, handle
from noxs.store import Connection, Store
from noxs.tree import Quota


class Peer:
    """A connection to a store, with everything it was sent."""

    def __init__(self, store: Store, ident: int, domid: int = 0, **kwargs: Any) -> None:
        self.store = store
        self.conn = Connection(ident, domid, **kwargs)
        store.connect(self.conn)

    def ask(self, op: int, payload: bytes = b"", tx: Any = 0) -> Any:
        """The reply, with events as (path, token) before or after it."""
        handle(self.store, self.conn, (op, 77, tx, payload))
        return self.take()

    def take(self) -> Any:
        messages = wire.Decoder().feed(b"".join(self.conn.out))
        self.conn.out.clear()
        shown = []
        for op, req_id, _, payload in messages:
            if op == wire.WATCH_EVENT:
                assert req_id == 0
                shown.append(tuple(wire.strings(payload)))
            else:
                assert req_id == 77
                shown.append(payload)
        return shown

    def write(self, path: Any, value: Any = b"", tx: Any = 0) -> Any:
        return self.ask(wire.WRITE, path + b"\0" + value, tx)

    def watch(self, path: Any, token: bytes = b"t") -> Any:
        return self.ask(wire.WATCH, path + b"\0" + token + b"\0")


@pytest.fixture
def store() -> Any:
    return Store()


@pytest.fixture
def kernel(store: Store) -> Any:
    return Peer(store, 0)


@pytest.fixture
def tool(store: Store) -> Any:
    return Peer(store, 1)


OK = [b"OK\0"]


def test_what_linux_asks_first(kernel: Peer) -> None:
    for path in (b"memory/target", b"control/shutdown", b"backend", b"cpu"):
        assert kernel.watch(path, b"FFFF8880") == [b"OK\0", (path, b"FFFF8880")]
    assert kernel.ask(wire.READ, b"memory/target\0") == [b"ENOENT\0"]


def test_events_of_a_relative_watch_are_relative(kernel: Peer, tool: Peer) -> None:
    kernel.watch(b"backend", b"k")
    tool.watch(b"/local/domain/0", b"t")
    assert tool.write(b"backend/vif/1/0/state", b"1") == [
        (b"/local/domain/0/backend/vif/1/0/state", b"t"),
        b"OK\0",
    ]
    assert kernel.take() == [(b"backend/vif/1/0/state", b"k")]


def test_watches_fire_for_what_is_below_and_not_beside(kernel: Peer, tool: Peer) -> None:
    kernel.watch(b"/a", b"k")
    for path in (b"/ab", b"/b/a"):
        tool.write(path)
    assert kernel.take() == []
    tool.write(b"/a/b/c")
    tool.ask(wire.MKDIR, b"/a/d\0")
    tool.ask(wire.MKDIR, b"/a/d\0")
    tool.ask(wire.SET_PERMS, b"/a\0n0\0r5\0")
    tool.ask(wire.RM, b"/a/b\0")
    tool.ask(wire.RM, b"/a/none\0")
    assert [path for path, _ in kernel.take()] == [b"/a/b/c", b"/a/d", b"/a", b"/a/b"]


def test_removal_reaches_watches_below_with_their_own_path(kernel: Peer, tool: Peer) -> None:
    tool.write(b"/a/b/c")
    kernel.watch(b"/a/b/c", b"deep")
    kernel.watch(b"/a/b", b"middle")
    kernel.watch(b"/a/none", b"none")
    kernel.watch(b"/", b"root")
    kernel.take()
    tool.ask(wire.RM, b"/a\0")
    assert kernel.take() == [(b"/a/b/c", b"deep"), (b"/a/b", b"middle"), (b"/a", b"root")]


def test_several_watches_fire_in_the_order_in_which_they_were_set(kernel: Peer, tool: Peer) -> None:
    for path, token in ((b"/a/b", b"1"), (b"/", b"2"), (b"/a", b"3"), (b"/a/b", b"4")):
        kernel.watch(path, token)
    tool.write(b"/a/b")
    assert [token for _, token in kernel.take()] == [b"1", b"2", b"3", b"4"]


def test_watch_and_unwatch_errors(kernel: Peer) -> None:
    assert kernel.watch(b"/a") == [b"OK\0", (b"/a", b"t")]
    assert kernel.watch(b"/a") == [b"EEXIST\0"]
    assert kernel.watch(b"/a", b"u") == [b"OK\0", (b"/a", b"u")]
    assert kernel.watch(b"/a//b") == [b"EINVAL\0"]
    assert kernel.ask(wire.WATCH, b"/a\0") == [b"EINVAL\0"]
    assert kernel.ask(wire.UNWATCH, b"/a\0v\0") == [b"ENOENT\0"]
    assert kernel.ask(wire.UNWATCH, b"/a\0u\0") == OK
    assert kernel.write(b"/a") == [(b"/a", b"t"), b"OK\0"]
    assert kernel.ask(wire.RESET_WATCHES, b"\0") == OK
    assert kernel.write(b"/a") == OK


def test_values_may_hold_anything(tool: Peer) -> None:
    value = bytes(range(256))
    assert tool.write(b"/a", value) == OK
    assert tool.ask(wire.READ, b"/a\0") == [value]
    assert tool.ask(wire.WRITE, b"/a") == [b"EINVAL\0"]
    assert tool.ask(wire.READ, b"/a") == [b"EINVAL\0"]
    assert tool.ask(wire.READ, b"") == [b"EINVAL\0"]
    assert tool.ask(wire.READ, b"@releaseDomain\0") == [b"EINVAL\0"]


def test_long_directories_come_in_parts(tool: Peer) -> None:
    names = [b"%04d" % i for i in range(2000)]
    for name in names:
        tool.write(b"/d/" + name)
    assert tool.ask(wire.DIRECTORY, b"/d\0") == [b"E2BIG\0"]
    got = b""
    while not got.endswith(b"\0\0"):
        (part,) = tool.ask(wire.DIRECTORY_PART, b"/d\0%d\0" % len(got))
        assert len(part) <= wire.PAYLOAD_MAX
        got += part.partition(b"\0")[2]
    assert got[:-1] == b"".join(name + b"\0" for name in names)
    (part,) = tool.ask(wire.DIRECTORY_PART, b"/d\0999999\0")
    assert part.endswith(b"\0\0")
    assert tool.ask(wire.DIRECTORY_PART, b"/d\0") == [b"EINVAL\0"]
    assert tool.ask(wire.DIRECTORY_PART, b"/none\0000\0") == [b"ENOENT\0"]


def test_a_transaction_announces_at_commit_what_it_changed(kernel: Peer, tool: Peer) -> None:
    tool.write(b"/a/old")
    kernel.watch(b"/a", b"k")
    kernel.take()
    (ident,) = tool.ask(wire.TRANSACTION_START, b"\0")
    assert ident == b"1\0"
    tool.write(b"/a/x", b"1", tx=1)
    tool.write(b"/a/x", b"2", tx=1)
    tool.ask(wire.RM, b"/a/old\0", tx=1)
    tool.write(b"/a/gone", tx=1)
    tool.ask(wire.RM, b"/a/gone\0", tx=1)
    assert kernel.take() == []
    assert tool.ask(wire.READ, b"/a/x\0") == [b"ENOENT\0"]
    assert tool.ask(wire.READ, b"/a/x\0", tx=1) == [b"2"]
    assert tool.ask(wire.TRANSACTION_END, b"T\0", tx=1) == OK
    assert kernel.take() == [(b"/a/x", b"k"), (b"/a/old", b"k")]
    assert tool.ask(wire.READ, b"/a/x\0") == [b"2"]


def test_a_conflict_is_eagain_and_ends_the_transaction(kernel: Peer, tool: Peer) -> None:
    tool.write(b"/a", b"1")
    tool.ask(wire.TRANSACTION_START, b"\0")
    tool.ask(wire.READ, b"/a\0", tx=1)
    tool.write(b"/b", b"", tx=1)
    kernel.write(b"/a", b"2")
    assert tool.ask(wire.TRANSACTION_END, b"T\0", tx=1) == [b"EAGAIN\0"]
    assert tool.ask(wire.READ, b"/b\0") == [b"ENOENT\0"]
    assert tool.ask(wire.TRANSACTION_END, b"T\0", tx=1) == [b"ENOENT\0"]


def test_transaction_errors(tool: Peer, kernel: Peer) -> None:
    assert tool.ask(wire.READ, b"/\0", tx=9) == [b"ENOENT\0"]
    assert tool.ask(wire.TRANSACTION_END, b"T\0") == [b"ENOENT\0"]
    tool.ask(wire.TRANSACTION_START, b"\0")
    assert tool.ask(wire.TRANSACTION_START, b"\0", tx=1) == [b"EBUSY\0"]
    assert tool.ask(wire.TRANSACTION_END, b"X\0", tx=1) == [b"EINVAL\0"]
    assert kernel.ask(wire.READ, b"/\0", tx=1) == [b"ENOENT\0"]
    assert tool.ask(wire.TRANSACTION_END, b"F\0", tx=1) == OK
    assert tool.store.tree.open == set()


def test_domains_are_introduced_and_released(kernel: Peer, tool: Peer) -> None:
    kernel.watch(b"@introduceDomain", b"i")
    kernel.watch(b"@releaseDomain", b"r")
    assert tool.ask(wire.IS_DOMAIN_INTRODUCED, b"7\0") == [b"F\0"]
    assert tool.ask(wire.INTRODUCE, b"7\00012345\0003\0") == OK
    assert tool.ask(wire.INTRODUCE, b"7\00012345\0003\0") == OK
    assert kernel.take() == [(b"@introduceDomain", b"i")]
    assert tool.ask(wire.IS_DOMAIN_INTRODUCED, b"7\0") == [b"T\0"]
    assert tool.ask(wire.RESUME, b"7\0") == OK
    tool.ask(wire.MKDIR, b"/local/domain/7\0")
    tool.ask(wire.SET_PERMS, b"/local/domain/7\0n7\0")
    assert tool.ask(wire.RELEASE, b"7\0") == OK
    assert kernel.take() == [(b"@releaseDomain", b"r")]
    assert tool.ask(wire.READ, b"/local/domain/7\0") == [b"ENOENT\0"]
    assert tool.ask(wire.RELEASE, b"7\0") == [b"ENOENT\0"]
    assert tool.ask(wire.RELEASE, b"0\0") == [b"EINVAL\0"]
    assert tool.ask(wire.INTRODUCE, b"7\0001\0") == [b"EINVAL\0"]
    assert tool.ask(wire.INTRODUCE, b"7\0001\0000\0") == [b"EINVAL\0"]
    assert tool.ask(wire.GET_DOMAIN_PATH, b"7\0") == [b"/local/domain/7\0"]
    assert tool.ask(wire.GET_DOMAIN_PATH, b"x\0") == [b"EINVAL\0"]


@pytest.mark.parametrize("op", [15, 16, 20, 23, 99, 0xFFFF])
def test_unknown_requests_are_enosys(tool: Peer, op: int) -> None:
    assert tool.ask(op, b"/\0") == [b"ENOSYS\0"]


def test_control(store: Store, tool: Peer) -> None:
    said = []
    store.log = said.append
    assert tool.ask(wire.CONTROL, b"check\0") == OK
    assert tool.ask(wire.CONTROL, b"print\0hi\0") == OK
    assert said == ["control: hi"]
    assert b"check" in tool.ask(wire.CONTROL, b"help\0")[0]
    assert tool.ask(wire.CONTROL, b"live-update\0") == [b"EINVAL\0"]


def test_requests_are_counted_by_type(store: Store, tool: Peer) -> None:
    del store
    tool.ask(wire.READ, b"/nowhere\0")
    tool.ask(wire.WRITE, b"/a\0b")
    tool.ask(wire.READ, b"/a\0")
    assert tool.ask(wire.CONTROL, b"count\0") == [b"READ 2\nWRITE 1\nCONTROL 1\n\0"]


def test_a_bug_costs_one_request_and_not_every_start_from_the_journal(
    store: Store, tool: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    store.log = said.append
    monkeypatch.setitem(HANDLERS, wire.MKDIR, lambda *_: 1 // 0)
    assert tool.ask(wire.MKDIR, b"/a\0") == [b"EIO\0"]
    assert "ZeroDivisionError" in said[0]
    assert tool.ask(wire.READ, b"/\0") == [b""]


@pytest.fixture
def guest(store: Store, tool: Peer) -> Any:
    tool.ask(wire.MKDIR, b"/local/domain/5/data\0")
    for path in (b"/local/domain/5", b"/local/domain/5/data"):
        tool.ask(wire.SET_PERMS, path + b"\0n5\0")
    return Peer(store, 2, 5, privileged=False, quota=Quota(watches=3, transactions=2))


@pytest.mark.parametrize(
    "op",
    [
        wire.CONTROL, wire.INTRODUCE, wire.RELEASE, wire.IS_DOMAIN_INTRODUCED, wire.RESUME,
        wire.SET_TARGET,
    ],
)  # fmt: skip
def test_a_guest_has_no_privileged_requests(guest: Peer, op: int) -> None:
    assert guest.ask(op, b"5\0005\0005\0") == [b"EACCES\0"]


def test_a_guest_s_quotas(guest: Peer) -> None:
    for i in range(3):
        assert guest.watch(b"x", b"%d" % i)[0] == b"OK\0"
    assert guest.watch(b"x", b"3") == [b"ENOSPC\0"]
    for _ in range(2):
        guest.ask(wire.TRANSACTION_START, b"\0")
    assert guest.ask(wire.TRANSACTION_START, b"\0") == [b"ENOSPC\0"]


def test_a_guest_learns_only_of_what_it_may_see(guest: Peer, tool: Peer) -> None:
    guest.watch(b"/", b"g")
    tool.write(b"/secret/x")
    tool.ask(wire.RM, b"/secret\0")
    assert guest.take() == []
    tool.write(b"/local/domain/5/data/x")
    tool.ask(wire.SET_PERMS, b"/local/domain/5/data/x\0n0\0r5\0")
    tool.write(b"/local/domain/5/data/x", b"1")
    tool.ask(wire.SET_PERMS, b"/local/domain/5/data/x\0n0\0")
    tool.ask(wire.RM, b"/local/domain/5/data\0")
    paths = [path for path, _ in guest.take()]
    assert paths.count(b"/local/domain/5/data/x") == 4
    assert paths[-1] == b"/local/domain/5/data"


def test_a_target_is_set_by_the_privileged(guest: Peer, tool: Peer) -> None:
    stub = Peer(guest.store, 3, 9, privileged=False)
    for domid in (5, 9):
        tool.ask(wire.INTRODUCE, b"%d\0001\0001\0" % domid)
    assert stub.ask(wire.READ, b"/local/domain/5\0") == [b"EACCES\0"]
    assert tool.ask(wire.SET_TARGET, b"9\0008\0") == [b"ENOENT\0"]
    assert tool.ask(wire.SET_TARGET, b"9\0005\0") == OK
    assert stub.ask(wire.READ, b"/local/domain/5\0") == [b""]


requests = st.tuples(
    st.one_of(st.integers(0, 23), st.integers(0, 0xFFFFFFFF)),
    st.integers(0, 3),
    st.one_of(
        st.binary(max_size=40),
        st.lists(
            st.sampled_from([b"/", b"/a", b"/a/b", b"a", b"T", b"n0", b"1", b"t", b"", b"@x"]),
            max_size=4,
        ).map(lambda parts: b"\0".join(parts) + b"\0"),
    ),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), requests), max_size=30))
def test_whatever_is_asked_gets_one_answer_and_the_tree_stays_whole(script: list[Any]) -> None:
    store = Store()
    peers = [Peer(store, 0), Peer(store, 1), Peer(store, 2, 5, privileged=False)]
    for who, (op, tx, payload) in script:
        replies = [r for r in peers[who].ask(op, payload, tx) if isinstance(r, bytes)]
        assert len(replies) == 1
        store.tree.check()
    for peer in peers:
        store.disconnect(peer.conn)
    assert store.watches == {}
    assert store.tree.open == set()


def test_serving_makes_no_reference_cycles(tool: Peer, kernel: Peer) -> None:
    kernel.watch(b"/a", b"k")
    gc.collect()
    gc.disable()
    try:
        for i in range(100):
            tool.write(b"/a/%d/x" % i, b"1")
            tool.ask(wire.TRANSACTION_START, b"\0")
            tool.write(b"/a/%d/y" % i, b"2", tx=i + 1)
            tool.ask(wire.TRANSACTION_END, b"T\0", tx=i + 1)
            tool.ask(wire.READ, b"/none\0")
            tool.ask(wire.RM, b"/a/%d\0" % i)
            kernel.take()
        assert gc.collect() == 0
    finally:
        gc.enable()
