"""noxsd with the real kernel, and the bus client with the real xenstored.

No guest is needed: netback makes an interface as soon as its nodes exist, and user space can put
requests of its own into the kernel's ring through /dev/xen/xenbus.
"""

from __future__ import annotations

import errno
import os
import random
import signal
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from waiting import wait_for

from noxs import wire
from noxs.bus import SOCKETS, Bus
from xenctypes.errors import BusError

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 60.0
SOCKET = "/run/noxs/socket"
LOG = Path("/run/noxsd.log")
CREDENTIALS = struct.Struct("iII")


class Noxsd:
    """The host's daemon; started if there is none, and never left dead."""

    def __init__(self) -> None:
        self.notify = Path("/run/noxsd-test-notify")

    def pid(self) -> int:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(SOCKET)
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        return int(CREDENTIALS.unpack(credentials)[0])

    def start(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            self.notify.unlink(missing_ok=True)
            manager.bind(str(self.notify))
            self.notify.chmod(0o777)  # as systemd's: noxsd is no longer root when it is ready
            manager.settimeout(PATIENCE)
            environment = {**os.environ, "NOTIFY_SOCKET": str(self.notify)}
            with LOG.open("ab") as log:
                subprocess.Popen(["noxsd"], stderr=log, env=environment, start_new_session=True)
            try:
                assert manager.recv(100) == b"READY=1"
            except TimeoutError:
                pytest.fail(LOG.read_text())

    def ensure(self) -> None:
        try:
            self.pid()
        except OSError:
            self.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        pid = self.pid()
        process = os.pidfd_open(pid)
        os.kill(pid, number)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            wait_for(lambda: not alive(process), "noxsd does not die")
        os.close(process)

    def restart(self) -> None:
        self.kill()
        self.start()


def alive(process: int) -> bool:
    try:
        signal.pidfd_send_signal(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def noxsd() -> Noxsd:
    daemon = Noxsd()
    daemon.ensure()
    return daemon


@pytest.fixture
def bus() -> Iterator[Bus]:
    with Bus.connect() as bus:
        yield bus


class KernelClient:
    """Requests through /dev/xen/xenbus: the kernel passes them on over its ring."""

    def __init__(self) -> None:
        self.fd = os.open("/dev/xen/xenbus", os.O_RDWR)
        self.decoder = wire.Decoder()
        self.ident = 0

    def ask(self, op: int, payload: bytes, tx: int = 0) -> bytes:
        self.ident += 1
        os.write(self.fd, wire.pack(op, self.ident, tx, payload))
        while True:
            for reply, ident, _, body in self.decoder.feed(os.read(self.fd, 8192)):
                if ident == self.ident:
                    return body if reply == op else b"error " + body

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def kernel() -> Iterator[KernelClient]:
    client = KernelClient()
    yield client
    client.close()


class Vif:
    """The nodes of a vif whose frontend does not connect."""

    def __init__(self, bus: Bus, domid: int) -> None:
        self.bus = bus
        self.front = f"/local/domain/{domid}/device/vif/0"
        self.back = f"/local/domain/0/backend/vif/{domid}/0"
        self.device = Path(f"/sys/class/net/vif{domid}.0")
        bus.write_many(
            [
                (f"{self.front}/backend", self.back),
                (f"{self.front}/backend-id", 0),
                (f"{self.front}/state", 1),
                (f"{self.front}/handle", 0),
                (f"{self.front}/mac", "00:16:3e:00:00:01"),
                (f"{self.back}/frontend", self.front),
                (f"{self.back}/frontend-id", domid),
                (f"{self.back}/online", 1),
                (f"{self.back}/handle", 0),
                (f"{self.back}/mac", "00:16:3e:00:00:01"),
                (f"{self.back}/type", "vif"),
                (f"{self.back}/script", "/bin/true"),
                (f"{self.back}/state", 1),
            ]
        )

    def appear(self) -> None:
        self.bus.wait_for(f"{self.back}/state", lambda state: state == "2", PATIENCE)
        wait_for(self.device.exists, f"{self.device} does not appear")

    def vanish(self) -> None:
        self.bus.write(f"{self.back}/online", 0)
        self.bus.write(f"{self.front}/state", 6)
        self.bus.write(f"{self.back}/state", 5)
        self.bus.rm_many([self.front, self.back])
        wait_for(lambda: not self.device.exists(), f"{self.device} stays")


def test_netback_is_served(noxsd: Noxsd, bus: Bus) -> None:
    vif = Vif(bus, 7001)
    vif.appear()
    assert bus.read(f"{vif.back}/feature-sg") == "1"
    vif.vanish()


def test_the_kernel_s_watches_survive_a_kill(noxsd: Noxsd, bus: Bus) -> None:
    before = Vif(bus, 7002)
    before.appear()
    noxsd.restart()
    after = Vif(bus, 7003)
    after.appear()
    before.vanish()
    noxsd.kill(signal.SIGTERM)
    noxsd.start()
    after.vanish()


def test_what_changes_while_a_vif_appears_survives_kills(noxsd: Noxsd, bus: Bus) -> None:
    for domid in range(7010, 7016):
        vif = Vif(bus, domid)
        noxsd.restart()
        vif.appear()
        vif.vanish()


def test_requests_through_the_kernel_survive_kills(noxsd: Noxsd, kernel: KernelClient) -> None:
    values = {}
    chance = random.Random(1)
    done = threading.Event()
    kills = []

    def killer() -> None:
        while not done.wait(chance.random() / 2):
            noxsd.restart()
            kills.append(1)

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        while len(kills) < 8:
            path = b"/kernel-test/%d" % chance.randrange(20)
            value = bytes(chance.randrange(256) for _ in range(chance.choice((1, 40, 900, 3000))))
            assert kernel.ask(wire.WRITE, path + b"\0" + value) == b"OK\0"
            values[path] = value
            other = chance.choice(list(values))
            assert kernel.ask(wire.READ, other + b"\0") == values[other]
    finally:
        done.set()
        thread.join()
    for path, value in values.items():
        assert kernel.ask(wire.READ, path + b"\0") == value
    assert kernel.ask(wire.RM, b"/kernel-test\0") == b"OK\0"


def test_a_transaction_of_the_kernel_s_survives_a_kill(noxsd: Noxsd, kernel: KernelClient) -> None:
    ident = int(kernel.ask(wire.TRANSACTION_START, b"\0")[:-1])
    assert kernel.ask(wire.WRITE, b"/tx-test\x001", ident) == b"OK\0"
    noxsd.restart()
    assert kernel.ask(wire.READ, b"/tx-test\0", ident) == b"1"
    assert kernel.ask(wire.TRANSACTION_END, b"T\0", ident) == b"OK\0"
    assert kernel.ask(wire.READ, b"/tx-test\0") == b"1"
    kernel.ask(wire.RM, b"/tx-test\0")


def test_sixty_four_clients_and_the_kernel(noxsd: Noxsd, bus: Bus, kernel: KernelClient) -> None:
    clients = [Bus.connect() for _ in range(64)]
    for client in clients:
        client.watch("/many", "w")
    assert kernel.ask(wire.WRITE, b"/many\0value") == b"OK\0"
    for client in clients:
        events: list[Any] = []
        while len(events) < 2:
            found = client.events(PATIENCE)
            assert found
            events += found
        assert events == [("/many", "w")] * 2
        client.close()
    bus.rm("/many")


def test_it_has_given_up_its_privileges(noxsd: Noxsd) -> None:
    pid = noxsd.pid()
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert "0" not in status["Uid"].split()
    assert "0" not in status["Gid"].split()
    assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0


def test_only_root_may_connect(noxsd: Noxsd) -> None:
    assert os.stat(SOCKET).st_mode & 0o777 == 0o600
    script = f"import socket; socket.socket(socket.AF_UNIX).connect({SOCKET!r})"
    command = ["setpriv", "--reuid=65534", "--clear-groups", "python3", "-c", script]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "PermissionError" in run.stderr


def test_another_store_for_the_same_kernel_is_refused(noxsd: Noxsd, tmp_path: Path) -> None:
    command = ["noxsd", "--socket", str(tmp_path / "socket"), "--state", str(tmp_path / "state")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "is taken: another store serves this host" in run.stderr


def test_a_lost_journal_is_reported(noxsd: Noxsd, bus: Bus) -> None:
    noxsd.kill()
    command = ["noxsd", "--state", "/run/noxs/empty"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    noxsd.start()
    Path("/run/noxs/empty").rmdir()
    assert run.returncode == 1
    assert "served by another store in this boot (the kernel's watches are lost" in run.stderr
    vif = Vif(bus, 7050)
    vif.appear()
    vif.vanish()


def test_a_full_file_system_refuses_changes_and_nothing_else(tmp_path: Path) -> None:
    state, path = tmp_path / "state", str(tmp_path / "socket")
    state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", state], check=True)
    # As root: pytest's directories are closed to other users.
    command = ["noxsd", "--socket-only", "--socket", path, "--state", str(state), "--user", ""]
    process = subprocess.Popen(command)
    try:
        wait_for(lambda: Path(path).exists(), "noxsd does not start")
        with Bus.connect(path) as bus:
            pairs = [(f"/full/{number}", "x" * 3000) for number in range(300)]
            with pytest.raises(BusError, match="ENOSPC"):
                bus.write_many(pairs)
            names = bus.directory("/full")
            assert len(names) > 30
            with pytest.raises(BusError, match="ENOSPC"):
                bus.write("/full/more", "x" * 4000)
            assert bus.read(f"/full/{names[-1]}") == "x" * 3000
            process.kill()
            process.wait()
            process = subprocess.Popen(command)
            assert bus.directory("/full") == names
    finally:
        process.kill()
        process.wait()
        subprocess.run(["umount", "-l", state], check=True)


@pytest.mark.xenstored
def test_beside_xenstored_it_refuses_to_start() -> None:
    run = subprocess.run(["noxsd"], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "xenstored serves this host" in run.stderr


# The client, with either server


@pytest.fixture
def either() -> Iterator[Bus]:
    if not any(Path(path).exists() for path in SOCKETS[1:]):
        Noxsd().ensure()
    with Bus.connect() as bus:
        bus.rm("/bus-test")
        yield bus
        bus.rm("/bus-test")


@pytest.mark.anyhost
def test_the_client(either: Bus) -> None:
    bus = either
    bus.write_many((f"/bus-test/{number:04}", number) for number in range(1200))
    assert bus.directory("/bus-test") == [f"{number:04}" for number in range(1200)]
    assert bus.read_many(["/bus-test/0007", "/bus-test/x"]) == ["7", None]
    with pytest.raises(BusError, match="read /bus-test/x: ENOENT") as caught:
        bus.read("/bus-test/x")
    assert caught.value.errno == errno.ENOENT
    bus.set_perms("/bus-test/0007", ["n0", "r0"])
    assert bus.perms("/bus-test/0007") == ["n0", "r0"]
    bus.rm_many(f"/bus-test/{number:04}" for number in range(1200))
    assert bus.directory("/bus-test") == []
    bus.watch("/bus-test", "token")
    bus.write("/bus-test/w", 1)
    assert bus.wait_for("/bus-test/w", lambda value: value == "1", PATIENCE) == "1"
    events = bus.events(PATIENCE)
    assert events[:2] == [("/bus-test", "token"), ("/bus-test/w", "token")]
    bus.unwatch("/bus-test", "token")


@pytest.mark.anyhost
def test_the_client_s_transactions(either: Bus) -> None:
    bus = either
    bus.write("/bus-test/n", 0)
    tries = []

    def add(tx: Any) -> None:
        tries.append(1)
        value = int(tx.read("/bus-test/n"))
        if len(tries) == 1:
            bus.write("/bus-test/n", 10)
        tx.write("/bus-test/n", value + 1)

    bus.transact(add)
    assert bus.read("/bus-test/n") == "11"
    assert len(tries) == 2
    assert not bus.is_introduced(4000)


# The same requests to noxsd and to xenstored


class Raw:
    """A socket to a store, for whole conversations."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        self.sock.settimeout(PATIENCE)
        self.decoder = wire.Decoder()
        self.messages: list[wire.Message] = []
        self.ident = 0

    def ask(self, op: int, tx: int, payload: bytes) -> tuple[int, bytes, list[bytes]]:
        """The reply's type and payload, and the events that came before it."""
        self.ident += 1
        self.sock.sendall(wire.pack(op, self.ident, tx, payload))
        events: list[bytes] = []
        while True:
            while self.messages:
                reply, ident, _, body = self.messages.pop(0)
                if reply != wire.WATCH_EVENT:
                    assert ident == self.ident
                    return reply, body, events
                events.append(body)
            data = self.sock.recv(1 << 16)
            assert data, "the store closed the connection"
            self.messages = self.decoder.feed(data)


def conversation(seed: int) -> list[tuple[int, int, int, bytes]]:
    """Random requests of two clients: (client, type, transaction, payload).

    Left out is what xenstored releases answer differently (domids that are not numbers, special
    and malformed paths where special ones may be), and removal while a transaction is open: a
    transaction that must fail may then see a child twice, or xenstored 4.17 aborts.
    """
    chance = random.Random(seed)
    script = []
    started = [0, 0]
    for _ in range(60):
        who = chance.randrange(2)
        tx = chance.choice([0, 0, started[who], started[who], 99]) if started[who] else 0
        op = chance.choice(REQUESTS)
        if op == wire.RM and any(started) and not tx:
            op = wire.READ
        elif op in {wire.WATCH, wire.UNWATCH}:
            tx = 0
        elif op == wire.TRANSACTION_START:
            tx = 0
            started[who] += 1
        script.append((who, op, tx, random_payload(chance, op)))
    return script


REQUESTS = (
    [wire.READ, wire.WRITE, wire.MKDIR, wire.RM, wire.DIRECTORY, wire.GET_PERMS] * 3
    + [wire.SET_PERMS, wire.WATCH, wire.UNWATCH, wire.TRANSACTION_START]
    + [wire.TRANSACTION_END] * 2
    + [wire.RESET_WATCHES, wire.GET_DOMAIN_PATH, 99]
)
ENDINGS = {
    wire.WRITE: [b"", b"v", b"value\0more"],
    wire.SET_PERMS: [b"n0\0", b"r0\0w0\0", b"b0\0", b"x0\0", b"n\0", b""],
    wire.WATCH: [b"t\0", b"u\0", b""],
    wire.UNWATCH: [b"t\0", b"u\0", b""],
}
PAYLOADS = {
    wire.TRANSACTION_START: [b"\0"],
    wire.TRANSACTION_END: [b"T\0", b"T\0", b"F\0", b"X\0", b""],
    wire.GET_DOMAIN_PATH: [b"7\0", b"7"],
}


def random_payload(chance: random.Random, op: int) -> bytes:
    if op in PAYLOADS:
        return chance.choice(PAYLOADS[op])
    names = [chance.choice([b"a", b"b", b"c"]) for _ in range(chance.randrange(4))]
    path = b"/".join([b"/diff", *names])
    odd = [path + b"/", b"", path + b"//x", b"@x", b"/diff/ "]
    if op in {wire.GET_PERMS, wire.SET_PERMS, wire.UNWATCH}:
        odd = []
    return chance.choice([path] * 20 + odd) + b"\0" + chance.choice(ENDINGS.get(op, [b""]))


def replay(path: str, script: list[tuple[int, int, int, bytes]]) -> list[Any]:
    clients = [Raw(path), Raw(path)]
    seen = []
    for who, op, tx, payload in [(0, wire.RM, 0, b"/diff\0"), *script]:
        answer = clients[who].ask(op, tx, payload)
        # A read makes sure that the other client has its events, too.
        others = [client.ask(wire.READ, 0, b"/\0")[2] for client in clients]
        seen.append((answer, others))
    for client in clients:
        client.sock.close()
    return seen


@pytest.mark.xenstored
def test_noxsd_answers_as_xenstored_does(tmp_path: Path, thorough: bool) -> None:
    path = str(tmp_path / "socket")
    command = ["noxsd", "--socket-only", "--socket", path, "--state", "", "--user", ""]
    with subprocess.Popen(command) as process:
        try:
            wait_for(lambda: Path(path).exists(), "noxsd does not start")
            theirs = next(path for path in SOCKETS[1:] if Path(path).exists())
            for seed in range(60 if thorough else 12):
                script = conversation(seed)
                expected, got = replay(theirs, script), replay(path, script)
                for number, (mine, real) in enumerate(zip(got, expected, strict=True)):
                    told = f"seed {seed}, request {number}: {script[number - 1]}"
                    assert mine == real, told
        finally:
            process.terminate()
