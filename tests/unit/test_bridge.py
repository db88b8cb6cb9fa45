"""A guest's devices: its store, Dom0's real bus, and the bridge between them."""

from __future__ import annotations

import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from noxsd_process import Noxsd
from stores_host import Control, Guest, Host

from noxs import wire
from noxs.bridge import JOBS, Bridge
from noxs.bus import Bus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FRONT = "/local/domain/5/device/vif/0"
BACK = "/local/domain/0/backend/vif/5/0"


@pytest.fixture(name="noxsd")
def running_noxsd(tmp_path: Path) -> Iterator[Noxsd]:
    noxsd = Noxsd(tmp_path).start()
    yield noxsd
    noxsd.kill(signal.SIGTERM)


@pytest.fixture(name="bus")
def bus_client(noxsd: Noxsd) -> Iterator[Bus]:
    with Bus.connect(noxsd.socket) as bus:
        yield bus


def connect(noxsd: Noxsd) -> Callable[[], Bus]:
    return lambda: Bus.connect(noxsd.socket, patience=1)


@pytest.fixture
def host(noxsd: Noxsd, tmp_path: Path) -> Iterator[Host]:
    host = Host(tmp_path, make_bridge=lambda: Bridge(connect(noxsd), print))
    yield host
    host.stores.close()


@pytest.fixture
def guest(host: Host, bus: Bus) -> Guest:
    """A guest with a vif whose toolstack has written its nodes on the bus."""
    guest = host.guest(5)
    bus.write_many([
        (f"{FRONT}/backend", BACK), (f"{FRONT}/backend-id", 0), (f"{FRONT}/state", 1),
        (f"{BACK}/frontend", FRONT), (f"{BACK}/frontend-id", 5), (f"{BACK}/script", "secret"),
        (f"{BACK}/state", 1),
    ])  # fmt: skip
    control = Control(host)
    assert control.ask(wire.CONTROL, "attach", 5, "vif", 0, "mac", "aa") == b"OK\0"
    return guest


def stop(bridge: Bridge) -> None:
    """What it is told from now on it does not pass on."""
    bridge.stop()
    bridge._thread.join(20)
    assert not bridge._thread.is_alive()


def test_a_handshake(host: Host, guest: Guest, bus: Bus) -> None:
    assert guest.read(b"device/vif/0/backend") == BACK.encode()
    assert guest.read(b"device/vif/0/mac") == b"aa"
    host.until(lambda: guest.read(BACK.encode() + b"/state") == b"1")
    guest.watch(BACK.encode() + b"/state", b"back")
    guest.events()
    bus.write_many([(f"{BACK}/feature-sg", 1), (f"{BACK}/state", 2)])
    events = host.until(guest.events)
    assert events == [(BACK.encode() + b"/state", b"back")]
    assert guest.read(BACK.encode() + b"/feature-sg") == b"1"
    assert guest.read(BACK.encode() + b"/state") == b"2"
    assert guest.read(BACK.encode() + b"/script") == b"ENOENT\0"
    bus.watch(FRONT, "t")
    bus.events(1)
    guest.ask(wire.TRANSACTION_START, b"\0")
    for key, value in (
        (b"tx-ring-ref", b"8"), (b"rx-ring-ref", b"9"), (b"event-channel", b"3"),
        (b"queue-0/tx-ring-ref", b"8"), (b"script", b"/bin/sh"), (b"request-rx-copy", b"yes"),
        (b"backend", b"/local/domain/0/backend/vif/6/0"), (b"state", b"4"),
    ):  # fmt: skip
        assert guest.write(b"device/vif/0/" + key, value, tx=1) == [b"OK\0"]
    assert guest.ask(wire.TRANSACTION_END, b"T\0", tx=1) == [b"OK\0"]
    host.until(lambda: bus.get(f"{FRONT}/state") == "4")
    changed = [path for path, _ in bus.events()]
    assert changed[-1] == f"{FRONT}/state"
    assert sorted(bus.directory(FRONT)) == [
        "backend", "backend-id", "event-channel", "queue-0", "rx-ring-ref", "state", "tx-ring-ref",
    ]  # fmt: skip
    assert bus.read(f"{FRONT}/backend") == BACK
    assert bus.read(f"{FRONT}/queue-0/tx-ring-ref") == "8"
    assert any("not passed on" in line and "script" in line for line in host.said)
    # A value that makes no sense leaves the last one; a key that is removed is removed.
    guest.write(b"device/vif/0/state", b"x")
    guest.ask(wire.RM, b"device/vif/0/event-channel\0")
    host.until(lambda: not bus.exists(f"{FRONT}/event-channel"))
    assert bus.read(f"{FRONT}/state") == "4"
    bus.rm(f"{BACK}/feature-sg")
    host.until(lambda: guest.read(BACK.encode() + b"/feature-sg") == b"ENOENT\0")


def test_what_the_toolstack_removed_is_not_made_again(host: Host, guest: Guest, bus: Bus) -> None:
    bus.rm(FRONT)
    guest.write(b"device/vif/0/state", b"6")
    guest.write(b"device/vif/0/tx-ring-ref", b"6")
    bus.rm(BACK)
    host.until(lambda: guest.read(BACK.encode() + b"/state") == b"ENOENT\0")
    assert not bus.exists(FRONT)


def test_a_device_that_is_being_taken_is_not_told_of(
    host: Host, guest: Guest, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was under way to the bus when the toolstack began must not undo what that wrote."""
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    transact = Bus.transact

    def late(self: Bus, function: Callable[..., Any], **more: Any) -> Any:
        if threading.current_thread().name != "bridge":
            return transact(self, function, **more)
        begun.set()
        assert go_on.wait(30)
        told = transact(self, function, **more)
        ended.set()
        return told

    monkeypatch.setattr(Bus, "transact", late)
    guest.write(b"device/vif/0/state", b"4")
    host.until(begun.is_set)
    assert Control(host).ask(wire.CONTROL, "detach", 5, "vif", 0) == b"OK\0"
    bus.write(f"{FRONT}/state", 6)
    go_on.set()
    assert ended.wait(30)
    assert bus.read(f"{FRONT}/state") == "6"


def test_a_detached_device_is_gone_on_both_sides(host: Host, guest: Guest, bus: Bus) -> None:
    guest.watch(b"device", b"d")
    control = Control(host)
    guest.events()
    assert control.ask(wire.CONTROL, "detach", 5, "vif", 0) == b"OK\0"
    assert (b"device/vif/0", b"d") in guest.events()
    assert guest.read(BACK.encode() + b"/state") == b"EACCES\0"
    bus.write(f"{BACK}/state", 6)
    assert guest.write(b"device/vif/0/state", b"4") == [b"EACCES\0"]
    # The next one with its name starts from the beginning.
    assert control.ask(wire.CONTROL, "attach", 5, "vif", 0) == b"OK\0"
    host.until(lambda: guest.read(BACK.encode() + b"/state") == b"6")
    guest.write(b"device/vif/0/state", b"3")
    host.until(lambda: bus.get(f"{FRONT}/state") == "3")


def test_a_storm_of_states_costs_the_bus_a_few_writes(host: Host, guest: Guest, bus: Bus) -> None:
    """A thousand a second for two seconds become at most twenty, and ten a second."""
    bus.watch(f"{FRONT}/state", "t")
    bus.events(1)
    start = host.clock.now
    number = 0
    while host.clock.now < start + 2:
        number += 1
        guest.write(b"device/vif/0/state", b"%d" % (1 + number % 6))
        host.clock.now += 0.0005
    last = b"%d" % (1 + number % 6)
    host.until(lambda: bus.get(f"{FRONT}/state") == last.decode())
    assert number > 500
    assert 1 <= len(bus.events()) <= 60


def test_who_always_has_more_to_tell_keeps_nobody_waiting(
    host: Host, guest: Guest, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    transact = Bus.transact
    (key,) = host.bridge._links
    told = [0]

    def again(self: Bus, function: Callable[..., Any], **more: Any) -> Any:
        if threading.current_thread().name == "bridge":
            told[0] += 1
            host.bridge.tell(key, {b"state": b"%d" % (1 + told[0] % 6)})
        return transact(self, function, **more)

    monkeypatch.setattr(Bus, "transact", again)
    guest.write(b"device/vif/0/state", b"3")
    host.until(lambda: told[0] > JOBS)
    bus.write(f"{BACK}/state", 4)
    host.until(lambda: guest.read(BACK.encode() + b"/state") == b"4")
    bus.write_many([("/local/domain/5/device/vif/1/backend", BACK[:-1] + "1")])
    bus.write(f"{BACK[:-1]}1/state", 2)
    assert Control(host).ask(wire.CONTROL, "attach", 5, "vif", 1) == b"OK\0"
    host.until(lambda: guest.read(BACK.encode()[:-1] + b"1/state") == b"2")


def test_noxsd_may_be_killed(host: Host, guest: Guest, bus: Bus, noxsd: Noxsd) -> None:
    host.until(lambda: guest.read(BACK.encode() + b"/state") == b"1")
    noxsd.kill()
    guest.write(b"device/vif/0/tx-ring-ref", b"8")
    guest.write(b"device/vif/0/state", b"4")
    begin = time.monotonic()
    assert guest.read(b"device/vif/0/state") == b"4"
    assert time.monotonic() - begin < 1, "a guest waits for Dom0's bus"
    noxsd.start()
    host.until(lambda: bus.get(f"{FRONT}/state") == "4")
    bus.write(f"{BACK}/state", 4)
    host.until(lambda: guest.read(BACK.encode() + b"/state") == b"4")


def test_storesd_may_be_killed(host: Host, guest: Guest, bus: Bus, noxsd: Noxsd) -> None:
    host.until(lambda: guest.read(BACK.encode() + b"/state") == b"1")
    stop(host.bridge)
    guest.write(b"device/vif/0/state", b"4")
    bus.write(f"{BACK}/state", 4)
    host.restart()
    host.until(lambda: bus.get(f"{FRONT}/state") == "4")
    host.until(lambda: guest.read(BACK.encode() + b"/state") == b"4")


def test_what_a_guest_removed_while_storesd_was_killed_is_removed(
    host: Host, guest: Guest, bus: Bus
) -> None:
    keys = (b"tx-ring-ref", b"rx-ring-ref", b"queue-0/tx-ring-ref", b"queue-0/rx-ring-ref")
    for key in keys:
        guest.write(b"device/vif/0/" + key, b"8")
    guest.write(b"device/vif/0/event-channel", b"3")
    guest.write(b"device/vif/0/state", b"4")
    host.until(lambda: bus.get(f"{FRONT}/state") == "4" and bus.exists(f"{FRONT}/event-channel"))
    stop(host.bridge)
    guest.ask(wire.RM, b"device/vif/0/tx-ring-ref\0")
    guest.ask(wire.RM, b"device/vif/0/queue-0/rx-ring-ref\0")
    guest.write(b"device/vif/0/event-channel", b"makes no sense")
    guest.write(b"device/vif/0/state", b"5")
    assert bus.exists(f"{FRONT}/tx-ring-ref")
    host.restart()
    host.until(lambda: bus.get(f"{FRONT}/state") == "5")
    assert sorted(bus.directory(FRONT)) == [
        "backend", "backend-id", "event-channel", "queue-0", "rx-ring-ref", "state",
    ]  # fmt: skip
    assert bus.directory(f"{FRONT}/queue-0") == ["tx-ring-ref"]
    assert bus.read(f"{FRONT}/event-channel") == "3"
    assert bus.read(f"{FRONT}/backend") == BACK
    # What is removed from now on goes as ever.
    guest.ask(wire.RM, b"device/vif/0/event-channel\0")
    guest.ask(wire.RM, b"device/vif/0/rx-ring-ref\0")
    left = ["backend", "backend-id", "queue-0", "state"]
    host.until(lambda: sorted(bus.directory(FRONT)) == left)
    stop(host.bridge)
    guest.ask(wire.RM, b"device/vif/0\0")
    host.restart()
    host.until(lambda: not bus.exists(f"{FRONT}/state"))
    assert bus.directory(f"{FRONT}/queue-0") == []
    assert bus.read(f"{FRONT}/backend") == BACK


def test_what_a_guest_has_again_after_a_kill_is_left_to_its_back_end(
    host: Host, guest: Guest, bus: Bus
) -> None:
    """It removed the key before the kill, and writes it before anything of it was told."""
    bus.write_many([(f"{FRONT}/tx-ring-ref", 8), (f"{FRONT}/rx-ring-ref", 9)])
    (key,) = host.bridge._links
    host.bridge.attach(key, FRONT.encode(), BACK.encode(), {b"state"})
    host.bridge.tell(key, {b"tx-ring-ref": b"8", b"state": b"3"})
    host.until(lambda: bus.get(f"{FRONT}/state") == "3")
    assert bus.read(f"{FRONT}/tx-ring-ref") == "8"
    assert not bus.exists(f"{FRONT}/rx-ring-ref")
