"""The Python client, against a server that a test writes the lines of."""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos import frames
from chaos.client import Chaos
from xenctypes.errors import (
    CallFailed,
    ChaosError,
    ConfigError,
    NoDaemon,
    PermissionDenied,
    ProtocolError,
    StateError,
)


class Server:
    """Accepts one client and gives each of its requests to ``answer``."""

    def __init__(self, path: Path, answer: Callable[[Any, frames.Request], None]) -> None:
        self.path = str(path)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.answer = answer
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        sock, _ = self.listener.accept()
        splitter = frames.Splitter()
        # A client that hangs up without having read all resets the connection.
        with sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while data := sock.recv(65536):
                for body in splitter.feed(data):
                    self.answer(sock, frames.read_request(body))

    def close(self) -> None:
        self.thread.join(10)
        self.listener.close()


Start = Callable[[Callable[[Any, frames.Request], None]], str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    servers: list[Server] = []

    def begin(answer: Callable[[Any, frames.Request], None]) -> str:
        servers.append(Server(tmp_path / "socket", answer))
        return servers[-1].path

    yield begin
    for server in servers:
        server.close()


def reply(sock: socket.socket, ident: int, kind: int, value: Any) -> None:
    sock.sendall(frames.pack_reply(ident, kind, value))


def test_replies_out_of_order_find_their_requests(start: Start) -> None:
    held: list[frames.Request] = []

    def answer(sock: socket.socket, request: frames.Request) -> None:
        held.append(request)
        if len(held) == 3:
            for each in reversed(held):
                reply(sock, each.ident, frames.OK, each.params["n"])

    with Chaos(start(answer)) as chaos:
        pending = [chaos.submit("echo", n=n) for n in range(3)]
        assert [each.result(10) for each in pending] == [0, 1, 2]


def test_many_threads_share_a_connection(start: Start) -> None:
    path = start(lambda sock, request: reply(sock, request.ident, frames.OK, request.params))
    results: dict[int, Any] = {}
    with Chaos(path) as chaos:

        def work(number: int) -> None:
            results[number] = [chaos.call("echo", n=number, i=i)["i"] for i in range(20)]

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == {number: list(range(20)) for number in range(8)}


def test_progress_comes_before_the_value(start: Start) -> None:
    def answer(sock: socket.socket, request: frames.Request) -> None:
        for number in range(3):
            reply(sock, request.ident, frames.PROGRESS, number)
        reply(sock, request.ident, frames.OK, "done")

    with Chaos(start(answer)) as chaos:
        pending = chaos.submit("long")
        assert list(pending.progress) == [0, 1, 2]
        assert pending.result() == "done"


def test_progress_is_for_whoever_wants_it(start: Start) -> None:
    asked: list[frames.Request] = []

    def answer(sock: socket.socket, request: frames.Request) -> None:
        asked.append(request)
        if request.params.get("progress"):
            for number in (1, 2):
                value = {"what": "web", "done": number, "total": 2}
                reply(sock, request.ident, frames.PROGRESS, value)
        if request.method != "cancel":
            reply(sock, request.ident, frames.OK, {"shells": 2})

    seen: list[Any] = []
    with Chaos(start(answer)) as chaos:
        chaos.destroy_all()
        assert "progress" not in asked[-1].params
        for call in (
            lambda: chaos.create("a.cfg", progress=seen.append),
            lambda: chaos.destroy("web", progress=seen.append),
            lambda: chaos.destroy_all(progress=seen.append),
            lambda: chaos.shutdown("web", progress=seen.append),
            lambda: chaos.reboot("web", progress=seen.append),
            lambda: chaos.pool_wait(progress=seen.append),
            lambda: chaos.pool_drain("f", progress=seen.append),
            lambda: chaos.pool_remove("f", progress=seen.append),
        ):
            call()
            assert [each["done"] for each in seen] == [1, 2], asked[-1].method
            seen.clear()
        with pytest.raises(ZeroDivisionError):
            chaos.pool_wait(progress=lambda _: 1 / 0)
        assert chaos.pool_drain("f") == 2


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ({"class": "StateError", "message": "no", "hint": "go", "exit_code": 1}, StateError, "no"),
        ({"class": "CallFailed", "message": "no", "hint": "", "exit_code": 1}, CallFailed, "no"),
        ({"class": "X", "message": "no", "hint": "", "exit_code": 3}, ChaosError, "no"),
        ({"class": "os", "message": "no", "hint": "", "exit_code": 7}, ChaosError, "no"),
        ("garbage", ProtocolError, "an error that is no map"),
    ],
)
def test_errors_come_back_as_their_class(start: Start, value: Any, kind: Any, text: str) -> None:
    path = start(lambda sock, request: reply(sock, request.ident, frames.ERROR, value))
    with Chaos(path) as chaos, pytest.raises(kind, match=text) as caught:
        chaos.call("anything")
    if isinstance(value, dict):
        assert caught.value.exit_code == value["exit_code"]


def test_a_daemon_that_goes_away_is_told_to_all(start: Start) -> None:
    def answer(sock: socket.socket, request: frames.Request) -> None:
        if request.method == "die":
            sock.shutdown(socket.SHUT_RDWR)

    with Chaos(start(answer)) as chaos:
        waiting = chaos.submit("wait")
        with pytest.raises(ProtocolError, match="went away before it answered"):
            chaos.call("die")
        with pytest.raises(ProtocolError, match="went away before it answered"):
            waiting.result(10)
        with pytest.raises(ProtocolError, match="went away"):
            chaos.call("more")


def test_nonsense_ends_the_connection(start: Start) -> None:
    path = start(lambda sock, _request: sock.sendall(b"\x01\x00\x00\x00\xc1"))
    with Chaos(path) as chaos, pytest.raises(ProtocolError, match="chaosd sends a frame that is"):
        chaos.call("anything")


def test_no_reply_in_time(start: Start) -> None:
    def answer(sock: socket.socket, request: frames.Request) -> None:
        held.append(request.ident)
        if request.method == "go":
            for ident in held:
                reply(sock, ident, frames.OK, ident)

    held: list[int] = []
    with Chaos(start(answer)) as chaos:
        pending = chaos.submit("slow")
        with pytest.raises(TimeoutError, match="no reply within"):
            pending.result(0.01)
        chaos.call("go")
        assert pending.result(0) == pending.ident


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(NoDaemon, match=r"no chaosd answers on .*: No such file"):
        Chaos(str(tmp_path / "none"))
    with pytest.raises(NoDaemon, match="too long"):
        Chaos("/" + "x" * 200)


def test_a_socket_closed_to_us(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(_self: socket.socket, _path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(PermissionDenied, match="member of the group chaos"):
        Chaos()


def test_the_socket_is_named_by_the_environment(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAOS_SOCKET", start(lambda *_: None))
    Chaos().close()


def test_what_is_no_request_of_ours_ends_the_connection(start: Start) -> None:
    path = start(lambda sock, request: reply(sock, request.ident + 1, frames.OK, None))
    with Chaos(path) as chaos, pytest.raises(ProtocolError, match="which is no request"):
        chaos.call("anything")


def test_an_error_of_the_connection_is_what_all_hear(start: Start) -> None:
    value = {"class": "StateError", "message": "full", "hint": "", "exit_code": 1}

    def answer(sock: socket.socket, request: frames.Request) -> None:
        if request.method == "last":
            reply(sock, 0, frames.ERROR, value)
            sock.shutdown(socket.SHUT_RDWR)

    with Chaos(start(answer)) as chaos:
        waiting = chaos.submit("first")
        for ask in (lambda: chaos.call("last"), waiting.result, lambda: chaos.call("more")):
            with pytest.raises(StateError, match="full"):
                ask()


def test_a_request_too_long_is_refused_before_it_is_sent(start: Start) -> None:
    path = start(lambda sock, request: reply(sock, request.ident, frames.OK, request.ident))
    with Chaos(path) as chaos:
        with pytest.raises(ProtocolError, match="at most"):
            chaos.call("x", data=b"x" * frames.FRAME_MAX)
        assert chaos.call("x") > 0


def test_replies_are_read_while_requests_are_sent(start: Start) -> None:
    """Neither side waits for the other, however much both have to say."""
    blob = b"x" * 200_000
    path = start(lambda sock, request: reply(sock, request.ident, frames.OK, blob))
    with Chaos(path) as chaos:
        pending = [chaos.submit("echo", data=blob) for _ in range(20)]
        assert all(each.result(10) == blob for each in pending)


class Counter:
    """Answers each request with as many numbers as it asks for, all requests at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads: list[threading.Thread] = []

    def answer(self, sock: socket.socket, request: frames.Request) -> None:
        thread = threading.Thread(target=self.count, args=(sock, request))
        self.threads.append(thread)
        thread.start()

    def count(self, sock: socket.socket, request: frames.Request) -> None:
        for number in range(request.params["n"]):
            with self.lock:
                reply(sock, request.ident, frames.PROGRESS, number)
        with self.lock:
            reply(sock, request.ident, frames.OK, request.params["n"])


def test_threads_with_replies_of_many_kinds(start: Start) -> None:
    counter = Counter()
    results: list[Any] = []
    with Chaos(start(counter.answer)) as chaos:

        def ask(number: int) -> None:
            for _ in range(10):
                pending = chaos.submit("count", n=number)
                seen = list(pending.progress) if number % 2 else list(range(number))
                results.append((number, pending.result(10), seen))

        askers = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in askers:
            thread.start()
        for thread in [*askers, *counter.threads]:
            thread.join(30)
            assert not thread.is_alive()
    assert sorted(results) == [(n, n, list(range(n))) for n in range(8) for _ in range(10)]


def test_closing_ends_what_other_threads_wait_for(start: Start) -> None:
    asked = threading.Semaphore(0)
    path = start(lambda _sock, _request: asked.release())
    said: list[str] = []
    chaos = Chaos(path)

    def wait() -> None:
        with pytest.raises(ProtocolError) as caught:
            chaos.call("wait")
        said.append(str(caught.value))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in threads:
        assert asked.acquire(timeout=10)
    chaos.close()
    chaos.close()
    for thread in threads:
        thread.join(10)
    assert said == ["the connection to chaosd is closed"] * 3
    with pytest.raises(ProtocolError, match="is closed"):
        chaos.call("more")


def test_ctrl_c_leaves_the_connection_whole(start: Start) -> None:
    def answer(sock: socket.socket, request: frames.Request) -> None:
        if request.method == "wait":
            held.append(request.ident)
            while not chaos._reading:
                time.sleep(0)
            os.kill(os.getpid(), signal.SIGINT)
        else:
            reply(sock, held.pop(), frames.OK, "late")
            reply(sock, request.ident, frames.OK, "new")

    held: list[int] = []
    with Chaos(start(answer)) as chaos:
        pending = chaos.submit("wait")
        with pytest.raises(KeyboardInterrupt):
            pending.result(10)
        assert chaos.call("go on") == "new"
        assert pending.result(0) == "late"


def test_a_number_in_use_is_not_given_again(start: Start) -> None:
    idents: list[int] = []

    def answer(sock: socket.socket, request: frames.Request) -> None:
        idents.append(request.ident)
        if request.method != "hold":
            reply(sock, request.ident, frames.OK, None)

    with Chaos(start(answer)) as chaos:
        held = chaos.submit("hold")
        chaos._ident = frames.ID_MAX
        for _ in range(3):
            chaos.call("x")
        assert idents == [held.ident, frames.ID_MAX, held.ident + 1, held.ident + 2]


class Asked(list[tuple[str, dict[str, Any]]]):
    """What a server was asked; it answers with what ``values`` has for the method."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def answer(self, sock: socket.socket, request: frames.Request) -> None:
        self.append((request.method, request.params))
        reply(sock, request.ident, frames.OK, self.values.get(request.method))


def test_create(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked(create={"domid": 3})
    monkeypatch.chdir(tmp_path)
    plain = {"overrides": [], "paused": False, "wait_ready": 0}
    with Chaos(start(asked.answer)) as chaos:
        assert chaos.create("a.cfg") == {"domid": 3}
        chaos.create(b"/x/\xff.cfg", ["vcpus=2"], name="fw-1", paused=True, wait_ready=1.5)
        chaos.create(config="memory=4")
        for name in ('a"', "a\\", "a\n"):
            with pytest.raises(ConfigError, match="is no name"):
                chaos.create("a.cfg", name=name)
    changed = {"overrides": ["vcpus=2", 'name="fw-1"'], "paused": True, "wait_ready": 1.5}
    assert asked == [
        ("create", plain | {"path": os.fsencode(tmp_path / "a.cfg")}),
        ("create", changed | {"path": b"/x/\xff.cfg"}),
        ("create", plain | {"config": "memory=4", "directory": str(tmp_path)}),
    ]


def test_the_other_methods(start: Start) -> None:
    asked = Asked(**{"logs": b"hello", "pool.drain": {"shells": 4}})
    with Chaos(start(asked.answer)) as chaos:
        chaos.list()
        chaos.list("a")
        chaos.destroy("a", "b", force=True)
        chaos.destroy_all()
        chaos.shutdown("a", wait=True, timeout=2)
        chaos.reboot("a")
        chaos.pause("a")
        chaos.unpause("a")
        chaos.rename("a", "b")
        chaos.wait("a", dead=True, timeout=3)
        chaos.info()
        chaos.version()
        assert chaos.logs("a") == b"hello"
        chaos.pool_list()
        chaos.pool_add(name="f", memory=4)
        chaos.pool_resize("f", 3)
        chaos.pool_resize("f", 3, low=1)
        assert chaos.pool_drain("f") == 4
        chaos.pool_remove("f")
    assert asked == [
        ("list", {"domains": []}),
        ("list", {"domains": ["a"]}),
        ("destroy", {"domains": ["a", "b"], "force": True}),
        ("destroy", {"all": True}),
        ("shutdown", {"domains": ["a"], "wait": True, "timeout": 2}),
        ("reboot", {"domains": ["a"], "wait": False}),
        ("pause", {"domain": "a"}),
        ("unpause", {"domain": "a"}),
        ("rename", {"domain": "a", "name": "b"}),
        ("wait", {"domain": "a", "dead": True, "timeout": 3}),
        ("info", {}),
        ("version", {}),
        ("logs", {"domain": "a"}),
        ("pool.list", {}),
        ("pool.add", {"flavour": {"name": "f", "memory": 4}}),
        ("pool.resize", {"name": "f", "size": 3}),
        ("pool.resize", {"name": "f", "size": 3, "low": 1}),
        ("pool.drain", {"name": "f"}),
        ("pool.remove", {"name": "f"}),
    ]


def cancelled(sock: socket.socket, ident: int) -> None:
    value = {"class": "ProtocolError", "message": "cancelled", "hint": "", "exit_code": 1}
    reply(sock, ident, frames.ERROR, value)


def test_events_are_cancelled_when_they_are_left(start: Start) -> None:
    def answer(sock: socket.socket, request: frames.Request) -> None:
        asked.append((request.method, request.params))
        if request.method == "events":
            for number in range(3):
                reply(sock, request.ident, frames.PROGRESS, {"token": f"t-{number}"})
        else:
            cancelled(sock, request.params["id"])
            reply(sock, request.ident, frames.OK, None)
            done.set()

    asked: list[tuple[str, dict[str, Any]]] = []
    done = threading.Event()
    with Chaos(start(answer)) as chaos:
        events = chaos.events("t-0")
        assert [next(events), next(events)] == [{"token": "t-0"}, {"token": "t-1"}]
        events.close()
        assert done.wait(10)
    assert asked == [("events", {"token": "t-0"}), ("cancel", {"id": 1})]


def test_a_console(start: Start) -> None:
    def answer(sock: socket.socket, request: frames.Request) -> None:
        asked.append((request.method, request.params))
        if request.method == "console.attach":
            reply(sock, request.ident, frames.PROGRESS, b"history")
        elif request.method == "console.write":
            reply(sock, request.params["id"], frames.PROGRESS, request.params["data"][:5])
            reply(sock, request.ident, frames.OK, None)
            if request.params["data"].endswith(b"end"):
                reply(sock, request.params["id"], frames.OK, "dead")

    asked: list[tuple[str, dict[str, Any]]] = []
    with Chaos(start(answer)) as chaos, chaos.console("hello") as console:
        console.write(b"x" * 70000)
        console.write(b"the end")
        assert list(console) == [b"history", b"xxxxx", b"xxxxx", b"the e"]
    assert [len(params["data"]) for method, params in asked if method == "console.write"] == [
        65536,
        4464,
        7,
    ]
