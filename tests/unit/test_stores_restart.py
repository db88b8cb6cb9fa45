"""storesd killed at every step: what guests and the toolstack notice of it, which is nothing."""

from __future__ import annotations

import os
import random
import select
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from killable import KillableJournal, KillableRing, Killed, Steps
from stores_host import UUID, Control, Guest, Hardware, Host, NoBridge

from noxs import guestloop, guestview, wire
from noxs.bus import Bus
from noxs.daemon import listen
from noxs.stores import Stores


class KillableHost(Host):
    """A host whose daemon is killed at some of its steps, and started again."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch, *, journal: bool = True) -> None:
        self.steps = Steps()
        self.kills = 0
        patch.setattr(guestloop, "Ring", lambda view: KillableRing(view, self.steps))
        patch.setattr(
            guestloop, "Journal", lambda path, **more: KillableJournal(path, self.steps, **more)
        )
        super().__init__(directory, journal=journal)

    def turn(self, seconds: float = 0.001) -> None:
        try:
            super().turn(seconds)
        except Killed:
            self.restart()

    def restart(self) -> None:
        while True:
            self.kills += 1
            try:
                super().restart()
            except Killed:
                continue
            return


def script() -> list[tuple[int, int, bytes]]:
    """What a guest might say: watches, transactions, requests longer than the ring."""
    requests = [(wire.WATCH, 0, b"data\0token\0"), (wire.WATCH, 0, b"/local/domain/5/attr\0W\0")]
    for i in range(3):
        path = b"data/vif/%d" % i
        requests += [
            (wire.TRANSACTION_START, 0, b"\0"),
            (wire.WRITE, i + 1, path + b"/feature-sg\x001"),
            (wire.WRITE, i + 1, path + b"/state\x002"),
            (wire.READ, i + 1, path + b"/state\0"),
            (wire.TRANSACTION_END, i + 1, b"T\0"),
            (wire.DIRECTORY, 0, b"data/vif\0"),
            (wire.READ, 0, path + b"/none\0"),
        ]
    requests += [
        (wire.WRITE, 0, b"attr/1\0" + b"x" * 2000),
        (wire.READ, 0, b"attr/1\0"),
        (wire.RM, 0, b"data\0"),
        (wire.UNWATCH, 0, b"/local/domain/5/attr\0W\0"),
        (wire.WRITE, 0, b"attr/1\0" + b"y" * 1500),
        (wire.READ, 0, b"attr/1\0"),
    ]
    return requests


STREAM = b"".join(
    wire.pack(op, number, tx, payload) for number, (op, tx, payload) in enumerate(script(), 1)
)


def run(host: Host, guest: Guest, stream: bytes) -> bytes:
    guest.peer.to_send += stream
    idle = 0
    while idle < 5:
        host.turn(0.03)
        idle = 0 if guest.peer.step() else idle + 1
    return guest.peer.got


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    host = Host(tmp_path_factory.mktemp("unharmed"), journal=False)
    got = run(host, host.guest(5), STREAM)
    assert len(wire.Decoder().feed(got)) > len(script())
    return got


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sets(st.integers(1, 400), max_size=60))
def test_kills_at_any_step_are_not_noticed(
    tmp_path_factory: pytest.TempPathFactory, expected: bytes, kills: Any
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        host = KillableHost(tmp_path_factory.mktemp("host"), patch)
        guest = host.guest(5)
        host.steps.kills = {host.steps.count + kill for kill in kills}
        assert run(host, guest, STREAM) == expected
        host.stores.guests[5].store.tree.check()


def test_each_step_is_one_to_be_killed_at(
    tmp_path_factory: pytest.TempPathFactory, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = 0
    for step in range(1, 60):
        host = KillableHost(tmp_path_factory.mktemp("host"), monkeypatch)
        guest = host.guest(5)
        host.steps.kills = {host.steps.count + step}
        assert run(host, guest, STREAM) == expected, step
        kills += host.kills
    assert kills > 50


actions = st.one_of(
    st.tuples(st.just("guest"), st.integers(1, 300)),
    st.tuples(st.just("write"), st.sampled_from(["data/vif", "attr/2", "x"])),
    st.tuples(st.just("rm"), st.sampled_from(["data/vif", "data"])),
    st.tuples(st.just("attach"), st.integers(0, 2)),
    st.tuples(st.just("detach"), st.integers(0, 2)),
    st.tuples(st.just("back"), st.integers(0, 2)),
    st.tuples(st.just("compact")),
    st.tuples(st.just("kill")),
)


def act(host: Host, guest: Guest, name: str, args: Any, stream: list[bytes]) -> None:
    base = "/local/domain/5/"
    if name == "guest":
        piece, stream[0] = stream[0][: args[0]], stream[0][args[0] :]
        run(host, guest, piece)
        return
    served = host.stores.guests[5]
    control = Control(host)
    if name == "write":
        control.ask(wire.WRITE, base + args[0], value=b"%d" % len(guest.peer.got))
    elif name == "rm":
        control.ask(wire.RM, base + args[0])
    elif name in {"attach", "detach"}:
        control.ask(wire.CONTROL, name, 5, "vif", args[0], *["mac", "m"] * (name == "attach"))
    elif name == "back":
        served.unheard[b"vif/%d" % args[0]] = {b"state": b"2", b"feature-sg": b"1"}
        served.show()
    elif name == "compact":
        served.save()
    control.sock.close()
    run(host, guest, b"")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(actions, max_size=40))
def test_a_restored_guest_hears_what_an_unharmed_one_does(
    tmp_path_factory: pytest.TempPathFactory, sequence: Any
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        host = KillableHost(tmp_path_factory.mktemp("host"), patch)
        unharmed = Host(tmp_path_factory.mktemp("unharmed"), journal=False)
        pair = [(host, host.guest(5), [STREAM]), (unharmed, unharmed.guest(5), [STREAM])]
        for _, guest, _ in pair:
            guest.watch(b"/local/domain/0/backend/vif/5/1", b"b")
            guest.watch(b"device", b"d")
        for name, *args in [*sequence, ["kill"]]:
            if name == "kill":
                host.restart()
                continue
            for each in pair:
                act(each[0], each[1], name, args, each[2])
        run(host, pair[0][1], b"")
        assert pair[0][1].peer.got == pair[1][1].peer.got
        trees = [
            {
                path: (node.value, node.perms)
                for path, node in one.stores.guests[5].store.tree.nodes.items()
            }
            for one in (host, unharmed)
        ]
        assert trees[0] == trees[1]
        host.stores.guests[5].store.tree.check()
        assert host.stores.guests[5].devices.keys() == unharmed.stores.guests[5].devices.keys()
        assert len(host.bridge.links) == len(host.stores.guests[5].devices)


def test_quotas_and_losses_are_the_same_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which events are lost depends on what was sent before: the journal knows."""
    got = []
    for journal in (False, True):
        directory = tmp_path / str(journal)
        directory.mkdir()
        host = KillableHost(directory, monkeypatch, journal=journal)
        guest, control = host.guest(5), Control(host)
        guest.watch(b"data", b"t" * 2000)
        for i in range(400):
            control.ask(wire.WRITE, f"/local/domain/5/data/{i}", value=b"")
            if i % 100 == 99:
                for _ in range(3):
                    host.turn()
                    guest.peer.step()
            if i == 250 and journal:
                host.restart()
                control = Control(host)
        run(host, guest, b"")
        got.append(guest.peer.got)
    assert got[0] == got[1]
    assert len(wire.Decoder().feed(got[0])) < 300


def test_a_guest_that_is_gone_or_another_one_is_not_served(tmp_path: Path) -> None:
    host = Host(tmp_path)
    for domid in (5, 6, 7):
        host.guest(domid)
    page = host.hardware.page(7)
    host.alive = {5: UUID % 5, 6: UUID % 66}
    before = bytes(page)
    host.restart()
    assert list(host.stores.guests) == [5]
    assert os.listdir(host.state) == [f"5.{UUID % 5}"]
    assert bytes(page) == before


def test_a_journal_that_is_damaged_costs_one_guest(tmp_path: Path) -> None:
    host = Host(tmp_path)
    for domid in (5, 6):
        host.guest(domid)
    for path in Path(host.state, f"5.{UUID % 5}").glob("snapshot.*"):
        path.write_bytes(b"x" * 100)
    host.restart()
    assert list(host.stores.guests) == [6]
    assert "domain 5 has lost its store" in host.said[-1]
    assert "destroy the guest and create it again" in host.said[-1]
    assert "reboot the host" not in host.said[-1]


def test_a_journal_that_cannot_be_replayed_costs_one_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path)
    for domid in (5, 6):
        host.guest(domid)
    restore = guestview.Guest.restore

    def broken(guest: Any, *arguments: Any) -> None:
        restore(guest, *arguments)
        assert guest.domid == 6, "a bug"

    monkeypatch.setattr(guestview.Guest, "restore", broken)
    host.restart()
    assert list(host.stores.guests) == [6]
    assert "domain 5 has lost its store: AssertionError" in host.said[-1]
    assert list(host.hardware.bound) == [1006]


def test_a_page_that_was_tampered_with_is_cut_off(tmp_path: Path) -> None:
    host = Host(tmp_path)
    bad, good = host.guest(5), host.guest(6)
    bad.write(b"data/x", b"1")
    bad.peer.set_index(3, bad.peer.index(3) + 300)
    host.restart()
    assert bad.peer.index(6) == 2
    assert good.read(b"domid") == b"6"


def test_a_full_file_system_makes_guests_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path)
    guest, control = host.guest(5), Control(host)
    journal = host.stores.guests[5].journal
    assert journal is not None

    def full(_record: bytes) -> None:
        raise OSError(28, "full")

    monkeypatch.setattr(journal, "append", full)
    guest.send(wire.WRITE, b"data/x\x001")
    for _ in range(5):
        guest.peer.step()
        host.turn()
    assert guest.receive() == []
    assert control.ask(wire.WRITE, "/local/domain/5/data/x", value=b"1") == b"ENOSPC\0"
    assert control.ask(wire.CONTROL, "attach", 5, "vif", 0) == b"ENOSPC\0"
    assert control.ask(wire.READ, "/local/domain/5/data/x") == b"ENOENT\0"
    assert "cannot be written" in host.said[-1]
    monkeypatch.undo()
    host.until(guest.receive)
    assert control.ask(wire.READ, "/local/domain/5/data/x") == b"1"


def test_a_journal_does_not_grow_without_end(tmp_path: Path) -> None:
    host = Host(tmp_path)
    guest, control = host.guest(5), Control(host)
    journal = host.stores.guests[5].journal
    assert journal is not None
    longest = 0
    for number in range(1000):
        control.ask(wire.WRITE, "/local/domain/5/attr/1", value=b"v" * 1000)
        if number % 2:
            guest.write(b"attr/2", b"w" * 1000)
        longest = max(longest, journal.length)
    assert 1 << 17 < longest < (1 << 18) + 2000
    assert len(os.listdir(journal.directory)) == 2
    host.restart()
    assert guest.read(b"attr/1") == b"v" * 1000


def test_a_guest_has_no_more_kept_than_it_may(tmp_path: Path) -> None:
    """And can make room again; a restart changes nothing of it."""
    host = Host(tmp_path)
    guest = host.guest(5)
    found = host.stores.guests[5]
    assert found.journal is not None
    found.conn.quota.memory = 20_000
    found.save()
    assert guest.write(b"data/a", b"v") == [b"OK\0"]
    for number in range(20):
        assert guest.write(b"data/%d" % number, b"v" * 1000) == [b"OK\0"]
    found.save()
    assert guest.ask(wire.WRITE, b"data/a\0v") == [b"ENOMEM\0"]
    assert guest.ask(wire.TRANSACTION_START, b"\0") == [b"ENOMEM\0"]
    assert guest.ask(wire.WATCH, b"data\0t\0") == [b"ENOMEM\0"]
    assert guest.read(b"data/a") == b"v"
    assert guest.ask(wire.RM, b"data\0") == [b"OK\0"]
    assert guest.ask(wire.MKDIR, b"attr/b\0") == [b"ENOMEM\0"]
    # It counts again when the log, which has what was refused as well, has grown long.
    number = found.journal.number
    while (reply := guest.write(b"attr/b", b"v" * 2000)) == [b"ENOMEM\0"]:
        assert found.journal.number == number
    assert reply == [b"OK\0"]
    host.restart()
    assert guest.read(b"attr/b") == b"v" * 2000


def test_guests_together_have_no_more_kept_than_they_may(tmp_path: Path) -> None:
    """Whoever has more than its share is refused more, across restarts; the others are not."""
    host = Host(tmp_path)
    greedy, modest = host.guest(5), host.guest(6)
    assert host.stores.budget > 1 << 20
    modest.write(b"data/x", b"1")

    def fill(guest: Guest) -> list[Any]:
        return [guest.write(b"data/%d" % n, b"v" * 2000)[0] for n in range(300)]

    host.stores.budget = 300_000
    replies = fill(greedy)
    assert (replies[0], replies[-1]) == (b"OK\0", b"ENOMEM\0")
    assert host.stores.kept < 700_000
    files = [path for path in Path(host.state).rglob("*") if path.is_file()]
    heads = 12 * len(files) // 2  # of the snapshots
    assert host.stores.kept == sum(path.stat().st_size for path in files) - heads
    assert modest.write(b"data/y", b"2" * 2000) == [b"OK\0"]
    host.restart()
    assert greedy.write(b"data/z", b"3") == [b"ENOMEM\0"]
    assert modest.write(b"data/y", b"3") == [b"OK\0"]
    assert greedy.write(b"data/z", b"3") == [b"OK\0"]  # there is room by now
    assert greedy.ask(wire.RM, b"data\0") == [b"OK\0"]
    host.until(lambda: greedy.write(b"attr/b", b"v" * 2000) == [b"OK\0"])
    assert Control(host).ask(wire.RELEASE, 5) == b"OK\0"
    left = host.stores.guests[6].journal
    assert left is not None
    assert host.stores.kept == left.base + left.length


# A real process, and SIGKILL


def spawn(directory: Path, hardware: Hardware, alive: dict[int, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        daemon = Stores(
            listen(str(directory / "control")),
            hardware,
            NoBridge(),  # type: ignore[arg-type]
            state=str(directory / "state"),
            boot="b",
            admit=lambda *_: True,
            log=lambda _: None,
        )
        daemon.restore(alive.get)
        daemon.run()
    except BaseException:  # noqa: BLE001 - nothing of the test's may run in this process
        traceback.print_exc()
    finally:
        os._exit(1)


def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """Two guests and the toolstack's client, across twenty kills of the real thing."""
    (tmp_path / "state").mkdir()
    hardware = Hardware(tmp_path)
    peers: list[Guest] = []
    shell: Any = type("Shell", (), {"hardware": hardware, "directory": tmp_path})
    for domid in (5, 6):
        hardware.page(domid)
        peers.append(Guest(shell, domid))
    alive = {5: UUID % 5, 6: UUID % 6}
    pid = spawn(tmp_path, hardware, alive)
    chance = random.Random(1)
    kills = 0
    wait = select.poll()
    try:
        while not (tmp_path / "control").exists():
            time.sleep(0.001)
        with Bus.connect(str(tmp_path / "control")) as bus:
            for domid in (5, 6):
                bus.ask(wire.CONTROL, b"open\0%d\0%s\0name\0" % (domid, alive[domid].encode()), "")
                bus.introduce(domid, 0, 7)
            bus.watch("/local/domain/5/data/last", "last")
            count = 400
            for peer in peers:
                peer.send(wire.WATCH, b"data\0t\0")
                for number in range(count):
                    peer.send(wire.WRITE, b"data/%d\0" % (number % 50) + b"v" * (number % 900))
                peer.send(wire.WRITE, b"data/last\0done")
            wanted = 2 * (count + 2)
            tool = 0
            deadline = time.monotonic() + 120
            while any(len(peer.peer.messages()) < wanted for peer in peers):
                assert time.monotonic() < deadline
                for peer in peers:
                    peer.peer.step()
                wait.poll(1)
                seen = min(len(peer.peer.messages()) for peer in peers)
                if kills < 20 and seen > wanted * kills / 20:
                    wait.poll(chance.random() * 5)
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    kills += 1
                    pid = spawn(tmp_path, hardware, alive)
                    tool += 1
                    bus.write("/local/domain/5/memory/target", tool)
            assert bus.read("/local/domain/5/memory/target") == str(tool)
            assert bus.wait_for("/local/domain/5/data/last", "done".__eq__, 10) == "done"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert kills >= 15
    for peer in peers:
        messages = peer.peer.messages()
        events = [m for m in messages if m[0] == wire.WATCH_EVENT]
        assert [m[1] for m in messages if m[0] != wire.WATCH_EVENT] == list(range(1, count + 3))
        assert all(m[3] == b"OK\0" for m in messages if m[0] != wire.WATCH_EVENT)
        assert [wire.strings(m[3])[0] for m in events] == [
            b"data", *(b"data/%d" % (number % 50) for number in range(count)), b"data/last",
        ]  # fmt: skip
