"""The Python client, against a server that a test writes the lines of."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos import frames
from chaos.client import Chaos
from xenctypes.errors import ChaosError, ProtocolError, StateError


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
        with sock:
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


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        ({"class": "StateError", "message": "no", "hint": "go", "exit_code": 1}, StateError, "no"),
        ({"class": "CallFailed", "message": "no", "hint": "", "exit_code": 1}, ChaosError, "no"),
        ({"class": "os", "message": "no", "hint": "", "exit_code": 7}, ChaosError, "no"),
        ("garbage", ProtocolError, "an error that is none"),
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
    with Chaos(path) as chaos, pytest.raises(ProtocolError, match="went away"):
        chaos.call("anything")


def test_no_reply_in_time(start: Start) -> None:
    path = start(lambda _sock, _request: None)
    with Chaos(path) as chaos, pytest.raises(TimeoutError, match="no reply within"):
        chaos.submit("slow").result(0.01)


def test_no_daemon(tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=r"no chaosd answers on .*: No such file"):
        Chaos(str(tmp_path / "none"))
