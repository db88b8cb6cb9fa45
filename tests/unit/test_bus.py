"""The client against a real noxsd process, and noxsd against real and hostile clients."""

import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from noxsd_process import Noxsd

from noxs import service, wire
from noxs.bus import Bus, server_paths
from noxs.nodes import string
from xenctypes.errors import BusError


@pytest.fixture
def noxsd(tmp_path: Path) -> Iterator[Noxsd]:
    server = Noxsd(tmp_path).start()
    yield server
    server.kill()


@pytest.fixture
def bus(noxsd: Noxsd) -> Iterator[Bus]:
    with Bus.connect(noxsd.socket, patience=10) as bus:
        yield bus


def test_nodes(bus: Bus) -> None:
    bus.write("/a/b", "value")
    bus.write("/a/n", 17)
    assert bus.read("/a/b") == "value"
    assert bus.read("/a") == ""
    assert bus.get("/a/none") is None
    assert (bus.children("/a/none"), bus.children("/a/b")) == (None, [])
    assert bus.get("/a/none", "x") == "x"
    assert bus.exists("/a/n")
    assert bus.directory("/a") == ["b", "n"]
    bus.mkdir("/a/d")
    assert bus.directory("/a/d") == []
    bus.rm("/a/b")
    bus.rm("/a/b")
    bus.rm("/none/at/all")
    assert bus.read_many(["/a/n", "/a/b", "/a"]) == ["17", None, ""]
    bus.set_perms("/a", ["n0", "r5"])
    assert bus.perms("/a") == ["n0", "r5"]
    bus.write("domid", "0")
    assert bus.read("/local/domain/0/domid") == "0"


def test_values_that_are_not_text_survive(bus: Bus) -> None:
    value = bytes(range(1, 256)).decode("utf-8", "surrogateescape")
    bus.write("/a", value)
    assert bus.read("/a") == value


@pytest.mark.parametrize(
    ("call", "number", "message"),
    [
        (lambda bus: bus.read("/none"), errno.ENOENT, "read /none: ENOENT"),
        (lambda bus: bus.write("/a//b", ""), errno.EINVAL, "write /a//b: EINVAL"),
        (lambda bus: bus.write("/a", "x" * 5000), errno.E2BIG, "5003 bytes"),
        (lambda bus: bus.read("/a\0b"), errno.EINVAL, "nul"),
        (lambda bus: bus.directory("/none"), errno.ENOENT, "directory /none"),
        (lambda bus: bus.set_perms("/", ["x"]), errno.EINVAL, "set perms /: EINVAL"),
        (lambda bus: bus.unwatch("/", "t"), errno.ENOENT, "unwatch /"),
        (lambda bus: bus.release(99), errno.ENOENT, "release: ENOENT"),
    ],
)
def test_errors_name_the_request_the_path_and_the_errno(
    bus: Bus, call: Callable[..., Any], number: int, message: str
) -> None:
    with pytest.raises(BusError, match=message) as caught:
        call(bus)
    assert caught.value.errno == number


def test_long_directories(bus: Bus) -> None:
    names = [f"{number:06}" for number in range(3000)]
    bus.write_many((f"/d/{name}", "") for name in names)
    assert bus.directory("/d") == names


def test_write_many_raises_what_went_wrong_and_writes_the_rest(bus: Bus) -> None:
    with pytest.raises(BusError, match="write /a//b: EINVAL"):
        bus.write_many([("/a/1", 1), ("/a//b", 2), ("/a/3", 3)])
    assert bus.directory("/a") == ["1", "3"]


def test_large_pipelines_do_not_deadlock(bus: Bus) -> None:
    bus.write_many((f"/big/{number}", "v" * 4000) for number in range(500))
    assert len("".join(bus.read_many(f"/big/{number}" for number in range(500)))) == 2_000_000


def test_watches(noxsd: Noxsd, bus: Bus) -> None:
    with Bus.connect(noxsd.socket) as other:
        bus.watch("/w", "one")
        assert bus.events(5) == [("/w", "one")]
        assert bus.events(0) == []
        other.write("/w/x", 1)
        assert bus.events(5) == [("/w/x", "one")]
        bus.watch("relative", "two")
        other.write("/local/domain/0/relative/y", 1)
        assert bus.read("/w/x") == "1"
        assert bus.events() == [("relative", "two"), ("relative/y", "two")]
        bus.unwatch("/w", "one")
        other.write("/w/x", 2)
        assert bus.read("/w/x") == "2"
        assert bus.events() == []


def test_wait_for_sleeps_until_the_value_is_right(noxsd: Noxsd, bus: Bus) -> None:
    def writer() -> None:
        with Bus.connect(noxsd.socket) as other:
            for state in (1, 2, 3, 4):
                other.write("/dev/state", state)

    bus.watch("/dev", "mine")
    thread = threading.Thread(target=writer)
    thread.start()
    assert bus.wait_for("/dev/state", lambda value: value == "4", 20) == "4"
    thread.join()
    assert ("/dev/state", "mine") in bus.events()
    assert bus.wait_for("/dev/state", lambda value: value is not None, 1) == "4"


def test_wait_for_gives_up(bus: Bus) -> None:
    with pytest.raises(BusError, match=r"/none: still None after 0\.1 s") as caught:
        bus.wait_for("/none", lambda value: value is not None, 0.1)
    assert caught.value.errno == errno.ETIMEDOUT
    assert caught.value.path == "/none"


def test_transactions(noxsd: Noxsd, bus: Bus) -> None:
    with bus.transaction() as tx:
        tx.write_many([("/t/a", 1), ("/t/b", 2)])
        assert not bus.exists("/t")
        assert tx.directory("/t") == ["a", "b"]
    assert bus.read("/t/b") == "2"

    class Mine(Exception):
        pass

    with pytest.raises(Mine), bus.transaction() as tx:  # noqa: PT012 - leaving is what is tested
        tx.write("/t/a", 9)
        raise Mine
    assert bus.read("/t/a") == "1"

    with (  # noqa: PT012 - as above
        pytest.raises(BusError, match="transaction end: EAGAIN"),
        bus.transaction() as tx,
    ):
        value = tx.read("/t/a")
        bus.write("/t/a", 5)
        tx.write("/t/b", value)
    assert bus.read("/t/b") == "2"


def test_transact_counts_right_among_competitors(noxsd: Noxsd) -> None:
    def add() -> None:
        with Bus.connect(noxsd.socket) as bus:
            for _ in range(50):
                bus.transact(lambda tx: tx.write("/n", int(tx.get("/n", "0")) + 1), 10000)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Bus.connect(noxsd.socket) as bus:
        assert bus.read("/n") == "200"


def test_transact_gives_up(bus: Bus) -> None:
    tries = []

    def function(tx: Any) -> None:
        tries.append(1)
        tx.get("/t")
        bus.write("/t", len(tries))

    with pytest.raises(BusError, match="EAGAIN"):
        bus.transact(function, 5)
    assert len(tries) == 5


def test_domains(bus: Bus) -> None:
    assert not bus.is_introduced(3)
    bus.introduce(3, 1000, 5)
    assert bus.is_introduced(3)
    bus.release(3)
    assert not bus.is_introduced(3)


def test_the_socket_is_found(noxsd: Noxsd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOXS_BUS", noxsd.socket)
    with Bus.connect() as bus:
        assert bus.path == noxsd.socket
    monkeypatch.delenv("NOXS_BUS")
    monkeypatch.delenv("XENSTORED_PATH", raising=False)
    assert server_paths()[0] == "/run/noxs/socket"
    monkeypatch.setattr("noxs.bus.SOCKETS", (str(tmp_path / "stale"), noxsd.socket))
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    with Bus.connect() as bus:
        assert bus.path == noxsd.socket
    monkeypatch.setattr("noxs.bus.SOCKETS", (str(tmp_path / "stale"),))
    with pytest.raises(BusError, match=r"no store answers: .*stale: Connection refused") as caught:
        Bus.connect()
    assert "NOXS_BUS" in caught.value.hint


def test_a_restart_is_survived(noxsd: Noxsd, bus: Bus) -> None:
    bus.write_many((f"/r/{number}", number) for number in range(100))
    bus.watch("/r", "w")
    bus.events(5)
    number = bus.fileno()
    noxsd.kill()
    noxsd.start()
    assert bus.read("/r/42") == "42"
    assert bus.fileno() == number
    assert bus.events(5) == [("/r", "w")]
    with Bus.connect(noxsd.socket) as other:
        other.write("/r/x", "")
    assert bus.events(5) == [("/r/x", "w")]


def test_one_who_only_waits_notices_a_restart(noxsd: Noxsd, bus: Bus) -> None:
    bus.watch("/r", "w")
    bus.events(5)
    noxsd.kill()
    thread = threading.Timer(0.3, noxsd.start)
    thread.start()
    assert bus.events(20) == [("/r", "w")]
    thread.join()


def test_a_transaction_is_lost_with_the_server_and_repeated(noxsd: Noxsd, bus: Bus) -> None:
    tries = []

    def function(tx: Any) -> Any:
        tries.append(1)
        tx.write("/t", len(tries))
        if len(tries) == 1:
            noxsd.kill()
            noxsd.start()
        return tx.read("/t")

    assert bus.transact(function) == "2"
    assert bus.read("/t") == "2"


class LosesReplies:
    """A way to noxsd on which the replies to commits get lost, and the connection with them.

    ``lose`` says how many; ``arrive`` whether those commits reach noxsd at all.
    """

    def __init__(self, noxsd: Noxsd, directory: Path, *, lose: int, arrive: bool = True) -> None:
        self.noxsd, self.lose, self.arrive = noxsd, lose, arrive
        self.path = str(directory / "way")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return
            with client, raw(self.noxsd) as server:
                self.carry(client, server)

    def carry(self, client: socket.socket, server: socket.socket) -> None:
        requests, replies = wire.Decoder(), wire.Decoder()
        lost = -1
        while True:
            for source in select.select([client, server], [], [])[0]:
                data = source.recv(1 << 16)
                if not data:
                    return
                if source is server:
                    messages = replies.feed(data)
                    if any(message[1] == lost for message in messages):
                        return
                    client.sendall(b"".join(wire.pack(*message) for message in messages))
                    continue
                for message in requests.feed(data):
                    if (message[0], message[3]) == (wire.TRANSACTION_END, b"T\0") and self.lose:
                        self.lose -= 1
                        if not self.arrive:
                            return
                        lost = message[1]
                    server.sendall(wire.pack(*message))

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join()


@pytest.mark.parametrize("arrive", [True, False])
def test_a_commit_without_a_reply_is_neither_repeated_nor_a_success(
    noxsd: Noxsd, tmp_path: Path, arrive: bool
) -> None:
    way = LosesReplies(noxsd, tmp_path, lose=1, arrive=arrive)
    tries = []

    def add(tx: Any) -> None:
        tries.append(1)
        tx.write("/n", int(tx.get("/n", "0")) + 1)

    with Bus.connect(way.path, patience=10) as bus:
        with pytest.raises(BusError, match="does not tell whether it was done") as caught:
            bus.transact(add)
        assert caught.value.errno == errno.ECONNABORTED
        assert tries == [1]
        # The connection works again, and the caller can look.
        assert bus.get("/n") == ("1" if arrive else None)
        bus.transact(add)
        assert bus.get("/n") == ("2" if arrive else "1")
    way.close()


def test_a_commit_that_looks_first_is_repeated_and_counts_once(
    noxsd: Noxsd, tmp_path: Path
) -> None:
    way = LosesReplies(noxsd, tmp_path, lose=3)
    seen = []

    def add_once(tx: Any) -> str:
        seen.append(tx.get("/once"))
        if seen[-1] is None:
            tx.write("/once", "mine")
            tx.write("/n", int(tx.get("/n", "0")) + 1)
        return "done"

    with Bus.connect(way.path, patience=10) as bus:
        assert bus.transact(add_once, repeatable=True) == "done"
        assert seen == [None, "mine", "mine", "mine"]
        assert bus.read("/n") == "1"
        way.lose = 5
        with pytest.raises(BusError, match="does not tell"):
            bus.transact(add_once, 5, repeatable=True)
    way.close()


def test_a_commit_that_never_left_is_repeated(noxsd: Noxsd, bus: Bus) -> None:
    """The server is gone before the commit: nothing can have been done."""
    tries = []

    def add(tx: Any) -> None:
        tries.append(1)
        tx.write("/n", int(tx.get("/n", "0")) + 1)
        if len(tries) == 1:
            noxsd.kill()
            noxsd.start()

    bus.transact(add)
    assert len(tries) == 2
    assert bus.read("/n") == "1"


def test_a_commit_that_takes_too_long_is_an_error(noxsd: Noxsd) -> None:
    with Bus.connect(noxsd.socket, patience=0.3) as bus:
        tries = []

        def stall(tx: Any) -> None:
            tries.append(1)
            tx.write("/n", len(tries))
            noxsd.process.send_signal(signal.SIGSTOP)

        try:
            with pytest.raises(BusError, match="no answer") as caught:
                bus.transact(stall)
        finally:
            noxsd.process.send_signal(signal.SIGCONT)
        assert caught.value.errno == errno.ETIMEDOUT
        assert tries == [1]


def test_a_gone_server_is_an_error_after_a_while(noxsd: Noxsd) -> None:
    with Bus.connect(noxsd.socket, patience=0.2) as bus:
        noxsd.kill()
        with pytest.raises(BusError, match="the store is gone"):
            bus.read("/")


def test_a_server_that_hangs_is_an_error_after_a_while(noxsd: Noxsd) -> None:
    with Bus.connect(noxsd.socket, patience=0.2) as bus:
        noxsd.process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(BusError, match=r"no answer for 0\.2 s"):
                bus.read("/")
        finally:
            noxsd.process.send_signal(signal.SIGCONT)
        # The overdue reply must not be taken for another's.
        bus.write("/after", "a stall")
        assert bus.read("/after") == "a stall"
        assert bus.directory("/") != ["a stall"]


def test_a_watch_that_a_restart_took_along_is_ended_without_error(noxsd: Noxsd, bus: Bus) -> None:
    bus.watch("/a", "token")
    noxsd.kill()
    noxsd.start()
    bus.unwatch("/a", "token")
    bus.write("/a", "1")
    assert bus.events() == []


def test_kills_in_the_middle_of_writes_lose_nothing(noxsd: Noxsd, bus: Bus) -> None:
    done = threading.Event()

    def reaper() -> None:
        while not done.wait(0.15):
            noxsd.kill()
            noxsd.start()

    thread = threading.Thread(target=reaper)
    thread.start()
    try:
        for number in range(3000):
            bus.write(f"/k/{number % 100}", number)
    finally:
        done.set()
        thread.join()
    assert bus.read_many(f"/k/{number}" for number in range(100)) == [
        str(2900 + number) for number in range(100)
    ]


# noxsd itself


def raw(noxsd: Noxsd) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(noxsd.socket)
    sock.settimeout(10)
    return sock


def drain(sock: socket.socket) -> list[wire.Message]:
    data = b""
    while True:
        try:
            part = sock.recv(1 << 16)
        except ConnectionResetError:
            part = b""
        if not part:
            return wire.Decoder().feed(data)
        data += part


@pytest.mark.parametrize(
    ("bad", "reply"),
    [
        (wire.HEADER.pack(wire.READ, 7, 3, 5000), (wire.ERROR, 7, 3, b"EINVAL\0")),
        (wire.HEADER.pack(wire.READ, 7, 3, 0xFFFFFFFF) + b"x", (wire.ERROR, 7, 3, b"EINVAL\0")),
        (b"GET / HTTP/1.0\r\n\r\n", (wire.ERROR, 0x2048202F, 0x50545448, b"EINVAL\0")),
    ],
)
def test_a_malformed_message_closes_its_client_with_an_error(
    noxsd: Noxsd, bus: Bus, bad: bytes, reply: wire.Message
) -> None:
    with raw(noxsd) as sock:
        sock.sendall(wire.pack(wire.READ, 1, 0, b"/\0") + bad)
        replies = drain(sock)
    assert replies[0] == (wire.READ, 1, 0, b"")
    assert replies[1][0] == reply[0]
    assert replies[1][3] == reply[3]
    assert bus.read("/") == ""
    assert "malformed" in noxsd.said()


@pytest.mark.parametrize("cut", [1, 15, 16, 20])
def test_a_truncated_message_is_answered_with_an_error(noxsd: Noxsd, bus: Bus, cut: int) -> None:
    with raw(noxsd) as sock:
        sock.sendall(wire.pack(wire.WRITE, 9, 0, b"/truncated\0value")[:cut])
        sock.shutdown(socket.SHUT_WR)
        (reply,) = drain(sock)
    assert reply == (wire.ERROR, 9 if cut > 7 else 0, 0, b"EINVAL\0")
    assert not bus.exists("/truncated")


def test_one_byte_at_a_time(noxsd: Noxsd) -> None:
    with raw(noxsd) as sock:
        for byte in wire.pack(wire.WRITE, 9, 0, b"/slow\0v"):
            sock.sendall(bytes([byte]))
        assert wire.Decoder().feed(sock.recv(100)) == [(wire.WRITE, 9, 0, b"OK\0")]


def test_one_who_never_reads_is_closed_and_hurts_nobody(noxsd: Noxsd, bus: Bus) -> None:
    with raw(noxsd) as sock:
        sock.sendall(wire.pack(wire.WATCH, 1, 0, string("/flood") + string("t" * 3000)))
        count = 0
        while "does not read" not in noxsd.said():
            bus.write_many((f"/flood/{number}", "") for number in range(50))
            count += 50
            assert count < 5000
        drain(sock)
    bus.write("/after", "1")


def test_one_who_asks_and_never_reads_is_not_read_either(noxsd: Noxsd, bus: Bus) -> None:
    bus.write("/big", "v" * 4000)
    with raw(noxsd) as sock:
        sock.setblocking(False)
        sent = 0
        try:
            while sent < 1 << 26:
                sent += sock.send(wire.pack(wire.READ, 1, 0, b"/big\0") * 100)
        except BlockingIOError:
            assert sent < 1 << 22
        else:
            pytest.fail("noxsd read on")
        assert bus.read("/big")
        sock.setblocking(True)
        got = 0
        while got < 100 * 4000:
            got += len(sock.recv(1 << 16))


def test_a_greedy_pipeline_is_served_whole(noxsd: Noxsd, bus: Bus) -> None:
    bus.write("/big", "v" * 4000)
    requests = wire.pack(wire.READ, 1, 0, b"/big\0") * 3000
    with raw(noxsd) as sock:
        sender = threading.Thread(target=sock.sendall, args=[requests])
        sender.start()
        got = 0
        while got < 3000 * 4016:
            part = sock.recv(1 << 16)
            assert part, noxsd.said()
            got += len(part)
        sender.join()


def test_sixty_four_clients_at_once(noxsd: Noxsd) -> None:
    clients = [Bus.connect(noxsd.socket) for _ in range(64)]
    for number, bus in enumerate(clients):
        bus.watch("/c", str(number))
    for number, bus in enumerate(clients):
        bus.write(f"/c/{number}", number)
    for number, bus in enumerate(clients):
        events = bus.events(5)
        while len(events) < 65:
            events += bus.events(5)
        assert events == [("/c", str(number))] + [(f"/c/{i}", str(number)) for i in range(64)]
        bus.close()


def test_too_many_clients_are_told(noxsd: Noxsd, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [raw(noxsd) for _ in range(service.CLIENTS_MAX)]
    with Bus.connect(noxsd.socket, patience=5) as late, pytest.raises(BusError, match="EBUSY"):
        late.read("/")
    for sock in clients:
        sock.close()
    deadline = time.monotonic() + 10
    while True:
        try:
            with Bus.connect(noxsd.socket) as bus:
                assert bus.read("/") == ""
            break
        except BusError:
            assert time.monotonic() < deadline


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_only_root_and_the_group_may_connect(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for directory in tmp_path.parents[:2]:
        directory.chmod(0o755)
    server = Noxsd(tmp_path).start("--group", "60123")
    try:
        assert os.stat(server.socket).st_mode & 0o777 == 0o660
        for group, answer in ((60123, b"OK\0"), (60124, None)):
            pid = os.fork()
            if not pid:
                os.setgroups([group])
                os.setresgid(65534, 65534, 65534)
                os.setresuid(65534, 65534, 65534)
                try:
                    sock = raw(server)
                    sock.sendall(wire.pack(wire.MKDIR, 1, 0, b"/g\0"))
                    os._exit(sock.recv(100)[16:] != answer)
                except PermissionError:
                    os._exit(answer is not None)
            assert os.waitpid(pid, 0)[1] == 0
        os.chmod(server.socket, 0o666)
        pid = os.fork()
        if not pid:
            os.setgroups([])
            os.setresuid(65534, 65534, 65534)
            os._exit(raw(server).recv(100)[16:] != b"EACCES\0")
        assert os.waitpid(pid, 0)[1] == 0
    finally:
        server.kill()


def test_a_second_noxsd_refuses_to_start(noxsd: Noxsd) -> None:
    run = subprocess.run(noxsd.command(), capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "another noxsd is running" in run.stderr


def test_sigterm_ends_it_cleanly_and_the_state_stays(noxsd: Noxsd) -> None:
    with Bus.connect(noxsd.socket) as bus:
        bus.write("/a", 1)
    assert noxsd.kill(signal.SIGTERM) == 0
    assert sorted(os.listdir(noxsd.state)) == ["log.1", "snapshot.1"]
    noxsd.start()
    with Bus.connect(noxsd.socket) as bus:
        assert bus.read("/a") == "1"


def test_the_journal_is_compacted_while_serving(noxsd: Noxsd, bus: Bus) -> None:
    for _ in range(12):
        bus.write_many((f"/c/{number}", "v" * 3900) for number in range(120))
    deadline = time.monotonic() + 20
    while "snapshot.0" in os.listdir(noxsd.state):
        bus.write("/tick", 1)
        assert time.monotonic() < deadline
    noxsd.kill()
    noxsd.start()
    assert bus.read_many([f"/c/{number}" for number in range(120)]) == ["v" * 3900] * 120


def test_help_and_bad_options(noxsd: Noxsd) -> None:
    run = subprocess.run(noxsd.command("--help"), capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert "--socket-only" in run.stdout
    run = subprocess.run(noxsd.command("--group", "nosuch"), capture_output=True, check=False)
    assert run.returncode == 2
    assert b"no such group" in run.stderr


def test_without_xen_it_says_so(tmp_path: Path) -> None:
    command = [part for part in Noxsd(tmp_path).command() if part != "--socket-only"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert "noxsd: /dev/xen/xenbus_backend" in run.stderr


@pytest.mark.skipif(not shutil.which("xenstore-ls"), reason="needs xenstore-utils")
def test_the_xenstore_tools_work(noxsd: Noxsd, bus: Bus) -> None:
    def tool(*command: str) -> tuple[int, str]:
        environment = {**os.environ, "XENSTORED_PATH": noxsd.socket}
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=20
        )
        assert run.stderr == ""
        return run.returncode, run.stdout

    assert tool("xenstore-write", "/a/b", "c", "/a/d", "e") == (0, "")
    assert tool("xenstore-read", "/a/b") == (0, "c\n")
    assert tool("xenstore-list", "/a") == (0, "b\nd\n")
    assert tool("xenstore-exists", "/a/b")[0] == 0
    assert tool("xenstore-exists", "/a/x")[0] == 1
    assert tool("xenstore-chmod", "/a/b", "n0", "r5") == (0, "")
    assert bus.perms("/a/b") == ["n0", "r5"]
    code, listing = tool("xenstore-ls", "-f", "-p", "/a")
    assert code == 0
    assert '/a/b = "c"' in listing
    assert "(n0,r5)" in listing
    bus.write_many((f"/many/{number:05}", "") for number in range(1500))
    assert len(tool("xenstore-ls", "/many")[1].splitlines()) == 1500
    assert tool("xenstore-rm", "/a/b") == (0, "")
    assert tool("xenstore-watch", "-n", "1", "/a") == (0, "/a\n")
