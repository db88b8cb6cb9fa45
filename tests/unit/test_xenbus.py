"""noxsd's end of the kernel's ring, killed at every step.

What survives a kill is the page and the journal's files. A kill is played by an exception at a
chosen step, after which everything else is thrown away and a new broker starts from those two;
and, further down, by SIGKILL sent to a real process at random moments.
"""

import contextlib
import os
import random
import select
import signal
from _socket import AF_UNIX, SOCK_STREAM, socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from killable import KillableJournal, KillableRing, Killed, Steps
from xenbus_peer import Peer, page_file

from noxs import wire
from noxs.broker import Broker
from noxs.journal import Journal
from noxs.requests import handle
from noxs.ring import Ring
from noxs.store import Connection, Store
from noxs.xenbus import XenBus
from xenctypes.errors import StateError


class KillableChannel:
    def __init__(self, steps: Any) -> None:
        self.steps = steps
        self.fd = os.eventfd(0)

    def __del__(self) -> None:
        os.close(self.fd)

    def fileno(self) -> int:
        return self.fd

    def take(self) -> None:
        pass

    def notify(self) -> None:
        self.steps()


class Host:
    """A page, a journal, and the noxsd of the moment."""

    def __init__(self, directory: Any, kills: Any = ()) -> None:
        self.page = page_file(directory / "page")
        self.peer = Peer(self.page)
        self.journal_path = directory / "journal"
        self.journal_path.mkdir()
        self.steps = Steps(kills)
        self.kills = 0
        self.boot = "this"
        self.broker = None
        self.said = []

    def start(self) -> None:
        listener = socket(AF_UNIX, SOCK_STREAM)
        journal = KillableJournal(str(self.journal_path), self.steps)
        broker = Broker(listener, journal=journal, boot=self.boot, log=self.said.append)
        ring = KillableRing(memoryview(self.page), self.steps)
        broker.xenbus = XenBus(ring, KillableChannel(self.steps), broker.store)
        broker.restore()
        self.broker = broker

    def serve(self) -> None:
        """One turn of the daemon, a new one if the last was killed."""
        try:
            if self.broker is None:
                self.start()
            self.broker.xenbus.serve(self.broker.journal)
        except Killed:
            self.kills += 1
            self.broker = None

    def run(self, stream: bytes) -> bytes:
        self.peer.to_send += stream
        idle = 0
        while idle < 3:
            self.serve()
            idle = 0 if self.peer.step() or self.broker is None else idle + 1
        return self.peer.got


def script() -> list[wire.Message]:
    """What a kernel might say: watches, transactions, requests longer than the ring."""
    requests = [(wire.WATCH, 0, b"backend\0FFFF8880\0"), (wire.WATCH, 0, b"/big\0W\0")]
    for i in range(3):
        path = b"backend/vif/%d/0" % i
        requests += [
            (wire.TRANSACTION_START, 0, b"\0"),
            (wire.WRITE, i + 1, path + b"/feature-sg\x001"),
            (wire.WRITE, i + 1, path + b"/state\x002"),
            (wire.READ, i + 1, path + b"/state\0"),
            (wire.TRANSACTION_END, i + 1, b"T\0"),
            (wire.DIRECTORY, 0, b"backend/vif\0"),
            (wire.READ, 0, path + b"/none\0"),
        ]
    requests += [
        (wire.WRITE, 0, b"/big/1\0" + b"x" * 3000),
        (wire.READ, 0, b"/big/1\0"),
        (wire.RM, 0, b"backend\0"),
        (wire.UNWATCH, 0, b"/big\0W\0"),
        (wire.WRITE, 0, b"/big/1\0" + b"y" * 1500),
        (wire.READ, 0, b"/big/1\0"),
    ]
    return [(op, number, tx, payload) for number, (op, tx, payload) in enumerate(requests, 1)]


def expected(requests: list[wire.Message]) -> bytes:
    store, conn = Store(), Connection(0)
    store.connect(conn)
    for request in requests:
        handle(store, conn, request)
    return b"".join(conn.out)


REQUESTS = script()
STREAM = b"".join(wire.pack(*request) for request in REQUESTS)
EXPECTED = expected(REQUESTS)


def test_the_kernel_gets_what_the_store_says(tmp_path: Path) -> None:
    host = Host(tmp_path)
    assert host.run(STREAM) == EXPECTED
    assert host.said == []


def test_a_kill_at_any_step_is_not_noticed(tmp_path: Path) -> None:
    steps = 0
    while True:
        steps += 1
        directory = tmp_path / str(steps)
        directory.mkdir()
        host = Host(directory, [steps])
        assert host.run(STREAM) == EXPECTED, f"killed at step {steps}"
        host.broker.store.tree.check()
        if not host.kills:
            break
    assert steps > 60


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sets(st.integers(1, 400), max_size=60))
def test_many_kills_are_not_noticed(tmp_path_factory: pytest.TempPathFactory, kills: Any) -> None:
    host = Host(tmp_path_factory.mktemp("host"), kills)
    assert host.run(STREAM) == EXPECTED


def test_the_indexes_may_wrap(tmp_path: Path) -> None:
    host = Host(tmp_path, range(10, 400, 4))
    host.start()
    # As after 4 GB of traffic; a first start wants a page that nobody has used.
    for number in range(4):
        host.peer.set_index(number, 0xFFFFFF00)
    xenbus = host.broker.xenbus
    xenbus.ring = KillableRing(memoryview(host.page), host.steps)
    xenbus.cons = xenbus.prod = 0xFFFFFF00
    host.broker.journal.replace(host.broker._state())
    host.broker = None
    assert host.run(STREAM) == EXPECTED
    assert host.kills > 8


def test_snapshots_in_between_change_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, range(3, 2000, 11))
    host.peer.to_send = STREAM
    for turn in range(3000):
        host.serve()
        if turn % 5 == 0 and host.broker is not None:
            host.broker.journal.rotate(host.broker._state)
            host.broker.journal.settle()
        if turn % 2:
            host.peer.step()
        if host.peer.got == EXPECTED:
            break
    assert host.peer.got == EXPECTED
    assert host.kills > 8


def test_sockets_changes_reach_the_kernel_once_across_kills(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.run(STREAM[: len(wire.pack(*REQUESTS[0]))])
    broker = host.broker
    client = Connection(9)
    broker.store.connect(client)
    for number in range(40):
        message = (wire.WRITE, number, 0, b"backend/%d\0" % number)
        broker.journal.append(b"\x03" + (9).to_bytes(4, "little") + wire.pack(*message))
        handle(broker.store, client, message)
    host.peer.got = b""
    host.serve()
    host.peer.step()
    host.broker = None
    host.run(b"")
    paths = [wire.strings(message[3])[0] for message in host.peer.messages()]
    assert paths == [b"backend/%d" % number for number in range(40)]
    assert list(host.broker.store.connections) == [0]
    assert host.broker.next_ident == 10


PATHS = [b"backend", b"backend/vif/1", b"backend/vif/1/state", b"backend/vif/2", b"/big"]
"""The script's kernel watches "backend" and "/big"."""

actions = st.one_of(
    st.tuples(st.just("kernel"), st.integers(1, 200)),
    st.tuples(st.just("start"), st.integers(0, 2)),
    st.tuples(st.just("write"), st.integers(0, 2), st.sampled_from(PATHS), st.booleans()),
    st.tuples(st.just("rm"), st.integers(0, 2), st.sampled_from(PATHS), st.booleans()),
    st.tuples(st.just("end"), st.integers(0, 2), st.sampled_from([b"T", b"F"])),
    st.tuples(st.just("hang up"), st.integers(0, 2)),
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("kill")),
)


class Reference:
    """A store that is never killed, with the three clients that its actions speak of."""

    def __init__(self) -> None:
        self.store, self.kernel = Store(), Connection(0)
        self.store.connect(self.kernel)
        self.decoder = wire.Decoder()
        self.clients: dict[int, Connection] = {}
        self.count = 0

    def client(self, number: int) -> Connection:
        if number not in self.clients:
            self.count += 1
            self.clients[number] = Connection(self.count)
            self.store.connect(self.clients[number])
        return self.clients[number]

    def hang_up(self, number: int) -> None:
        if number in self.clients:
            self.store.disconnect(self.clients.pop(number))


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example([  # a client that had a transaction before the snapshot, and one after it
    ("kernel", 100), ("start", 0), ("end", 0, b"T"), ("snapshot",),
    ("start", 0), ("write", 0, b"backend", True), ("end", 0, b"T"), ("kill",),
])  # fmt: skip
@given(st.lists(actions, max_size=60))
def test_a_restored_store_says_what_an_unharmed_one_does(
    tmp_path_factory: pytest.TempPathFactory, sequence: Any
) -> None:
    host, reference, stream = Host(tmp_path_factory.mktemp("host")), Reference(), STREAM
    host.run(b"")
    clients: dict[int, Connection] = {}
    for name, *args in sequence:
        broker = host.broker
        if name == "kernel":
            piece, stream = stream[: args[0]], stream[args[0] :]
            for message in reference.decoder.feed(piece):
                handle(reference.store, reference.kernel, message)
            host.run(piece)
        elif name == "snapshot":
            broker.journal.rotate(broker._state)
            assert broker.journal.settle()
        elif name == "kill":
            host.broker = None
            clients.clear()
            for number in range(3):
                reference.hang_up(number)
            host.run(b"")
        elif name == "hang up":
            reference.hang_up(args[0])
            if args[0] in clients:
                broker.store.disconnect(clients.pop(args[0]))
        else:
            twin = reference.client(args[0])
            if args[0] not in clients:
                clients[args[0]] = Connection(broker.next_ident)
                broker.store.connect(clients[args[0]])
                broker.next_ident += 1
            client = clients[args[0]]
            tx = max(client.transactions, default=0) if name == "end" or args[-1] is True else 0
            request = {
                "start": (wire.TRANSACTION_START, 1, 0, b"\0"),
                "write": (wire.WRITE, 1, tx, args[1] + b"\0value" if args[1:] else b""),
                "rm": (wire.RM, 1, tx, args[1] + b"\0" if args[1:] else b""),
                "end": (wire.TRANSACTION_END, 1, tx, args[1] + b"\0" if args[1:] else b""),
            }[name]
            assert broker._journal(client, [request])
            handle(broker.store, client, request)
            handle(reference.store, twin, request)
            assert client.out == twin.out
    host.broker = None
    assert host.run(b"") == b"".join(reference.kernel.out)
    host.broker.store.tree.check()
    assert {
        path: (node.value, node.perms) for path, node in host.broker.store.tree.nodes.items()
    } == {path: (node.value, node.perms) for path, node in reference.store.tree.nodes.items()}


def test_a_corrupt_ring_is_announced_and_left_alone_until_the_kernel_reconnects(
    tmp_path: Path,
) -> None:
    host = Host(tmp_path)
    host.run(wire.pack(*REQUESTS[0]))
    host.peer.set_index(1, host.peer.index(0) + 5000)
    host.serve()
    assert "corrupt" in host.said[-1]
    assert host.peer.index(6) == 2
    host.serve()
    host.broker = None
    host.serve()
    assert host.broker.xenbus.dead
    assert host.broker.store.watches == {}
    host.peer.set_index(5, 1)
    host.serve()
    assert [host.peer.index(number) for number in (0, 1, 2, 3, 5, 6)] == [0] * 6
    host.peer.got = b""
    assert host.run(STREAM) == EXPECTED
    host.broker = None
    assert host.run(wire.pack(wire.READ, 1, 0, b"/big/1\0"))[-1500:] == b"y" * 1500


def test_a_request_longer_than_the_protocol_allows_ends_the_service(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.run(wire.HEADER.pack(wire.READ, 1, 0, 4097))
    assert "4097 bytes" in host.said[-1]
    assert host.peer.index(6) == 3


def test_a_page_that_another_store_has_used_is_refused(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.peer.set_index(0, 64)
    host.peer.set_index(1, 64)
    with pytest.raises(StateError, match="served by another store"):
        host.start()


def test_a_journal_of_an_earlier_boot_is_discarded(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.run(STREAM)
    host.page[:] = bytes(4096)
    host.peer.got = b""
    host.boot = "next"
    host.broker = None
    assert host.run(STREAM) == EXPECTED


def test_a_page_that_moved_on_without_us_is_refused(tmp_path: Path) -> None:
    host = Host(tmp_path)
    host.run(STREAM)
    host.peer.set_index(3, host.peer.index(3) + 100)
    with pytest.raises(StateError, match="does not match the journal"):
        host.start()


def test_a_journal_that_cannot_be_written_takes_nothing_from_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path)
    host.start()
    host.peer.to_send = STREAM
    host.peer.step()
    monkeypatch.setattr(host.broker.journal, "append", _no_space)
    with pytest.raises(OSError, match="full"):
        host.broker.xenbus.serve(host.broker.journal)
    assert host.peer.index(0) == 0
    monkeypatch.undo()
    assert host.run(b"") == EXPECTED


def _no_space(_record: bytes) -> None:
    raise OSError(28, "full")


class EventChannel:
    """An event channel between processes: an eventfd for each direction."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self.incoming = incoming
        self.outgoing = outgoing

    def fileno(self) -> int:
        return self.incoming

    def take(self) -> None:
        os.eventfd_read(self.incoming)

    def notify(self) -> None:
        os.eventfd_write(self.outgoing, 1)


def spawn_broker(page: Any, directory: Any, channel: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        listener = socket(AF_UNIX, SOCK_STREAM)
        listener.bind(f"{directory}/socket.{os.getpid()}")
        listener.listen()
        broker = Broker(listener, journal=Journal(str(directory)), boot="b", log=lambda s: None)
        broker.xenbus = XenBus(Ring(memoryview(page)), channel, broker.store)
        broker.restore()
        broker.run()
    finally:
        os._exit(1)


def test_sockets_wait_while_the_kernel_lags_behind(tmp_path: Path) -> None:
    page = page_file(tmp_path / "page")
    journal = tmp_path / "journal"
    journal.mkdir()
    to_broker, to_peer = os.eventfd(0), os.eventfd(0)
    peer = Peer(page, lambda: os.eventfd_write(to_broker, 1))
    pid = spawn_broker(page, journal, EventChannel(to_broker, to_peer))
    try:
        peer.to_send = wire.pack(wire.WATCH, 1, 0, b"/w\0t\0")
        while len(peer.messages()) < 2:
            peer.step()
        count = 4000
        requests = [wire.pack(wire.WRITE, n, 0, b"/w/%d\0" % n) for n in range(count)]
        sock = socket(AF_UNIX, SOCK_STREAM)
        sock.connect(f"{journal}/socket.{pid}")
        sock.setblocking(False)
        stream, replies, lagging = b"".join(requests), wire.Decoder(), True
        answered = 0
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        while answered < count:
            with contextlib.suppress(BlockingIOError):
                stream = stream[sock.send(stream) :] if stream else stream
            if poll.poll(300 if lagging else 0):
                answered += len(replies.feed(sock.recv(1 << 16)))
            elif lagging:
                # 64 KiB of events wait for a kernel that has not read since its watch was set.
                assert 1000 < answered < 3000
                lagging = False
            if not lagging:
                peer.step()
        while len(peer.messages()) < count + 2:
            peer.step()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    paths = [wire.strings(payload)[0] for op, _, _, payload in peer.messages()[1:]]
    assert paths == [b"/w", *(b"/w/%d" % n for n in range(count))]


def test_sigkill_at_random_moments_is_not_noticed(tmp_path: Path) -> None:
    page = page_file(tmp_path / "page")
    journal = tmp_path / "journal"
    journal.mkdir()
    to_broker, to_peer = os.eventfd(0), os.eventfd(0, os.EFD_NONBLOCK)
    peer = Peer(page, lambda: os.eventfd_write(to_broker, 1))
    rounds = 40
    requests = [
        (wire.WATCH, 1, 0, b"/w\0token\0"),
        *(
            (wire.WRITE, number, 0, b"/w/%d\0%d" % (number % 50, number) + b"v" * (number % 1300))
            for number in range(2, 1500)
        ),
    ]
    peer.to_send = b"".join(wire.pack(*request) for request in requests)
    wanted = expected(requests)
    chance = random.Random(1)
    kills = 0
    pid = spawn_broker(page, journal, EventChannel(to_broker, to_peer))
    try:
        while len(peer.got) < len(wanted):
            if not peer.step():
                os.sched_yield()
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "noxsd gave up by itself"
            if kills < rounds and len(peer.got) > len(wanted) * kills / rounds:
                for _ in range(chance.randrange(2000)):
                    peer.step()
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                kills += 1
                pid = spawn_broker(page, journal, EventChannel(to_broker, to_peer))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert peer.got == wanted
    assert kills > rounds // 2
