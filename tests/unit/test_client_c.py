"""The command's client, client/chaos.c, against a daemon of the test's making."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import socket
import subprocess
import tempfile
import termios
import time
import tty
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from daemon_peer import PATIENCE, Connection, Server

from chaos import frames
from hatch_build import compile_client

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = Path(__file__).parents[2] / "client" / "chaos.c"
NOBODY = 65534
SYS_CONNECT, SYS_SENDMSG = 42, 46  # asm/unistd_64.h
FAKE_PYTHON = """\
#!/bin/sh
printf '%s|' python "${CHAOS_NO_DAEMON-unset}" "$@"
exit 7
"""
GONE = "chaos: the daemon went away before it answered (chaos list shows what became of it)\n"
MALFORMED = "chaos: chaosd's reply is malformed (restart a chaosd of another release)\n"


class Client:
    """The compiled client, with a chaos-python beside it that tells how it was called."""

    def __init__(self, program: Path, server: Server) -> None:
        self.program = program
        self.env = {"CHAOS_SOCKET": str(server.path), "PATH": "/usr/bin:/bin"}

    def start(self, *argv: str | bytes, **options: Any) -> subprocess.Popen[bytes]:
        options = {
            **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
            "env": self.env,
            **options,
        }
        return subprocess.Popen([self.program, *argv], **options)

    def run(self, *argv: str | bytes, **options: Any) -> tuple[int, str, str]:
        return finish(self.start(*argv, **options))


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    """Wait for the end: exit status, standard output, standard error."""
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, (out or b"").decode(), (err or b"").decode()


def requested(connection: Connection) -> dict[str, Any]:
    """The parameters of the `run` that must come next."""
    request = connection.receive()
    assert request is not None
    assert (request.ident, request.method) == (1, "run")
    assert len(connection.descriptors) == 4
    return request.params


def in_system_call(pid: int, number: int) -> bool:
    """Whether a process waits in a system call."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == str(number)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline


def is_null(fd: int) -> bool:
    return os.fstat(fd).st_rdev == os.stat("/dev/null").st_rdev


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bin")
    folder.chmod(0o755)
    compile_client(SOURCE, folder / "chaos")
    (folder / "chaos-python").write_text(FAKE_PYTHON)
    (folder / "chaos-python").chmod(0o755)
    return folder / "chaos"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "s") as server:
        yield server


@pytest.fixture
def client(program: Path, server: Server) -> Client:
    return Client(program, server)


def test_the_source_agrees_with_the_frames() -> None:
    text = SOURCE.read_text()
    assert f"FRAME_MAX (1u << {frames.FRAME_MAX.bit_length() - 1})" in text
    assert f'VERSION   "\\x{frames.VERSION:02x}"' in text
    assert "enum { OK, ERROR, PROGRESS, EXEC };" in text
    assert [frames.OK, frames.ERROR, frames.PROGRESS, frames.EXEC] == [0, 1, 2, 3]
    assert len(text.splitlines()) < 300


def test_the_program_needs_no_loader(program: Path) -> None:
    headers = subprocess.run(
        ["readelf", "-lW", program], capture_output=True, text=True, check=True
    ).stdout
    assert "INTERP" not in headers
    assert "DYNAMIC" not in headers
    assert "RWE" not in headers  # neither a writable segment nor the stack can be executed
    assert program.stat().st_size < 16384


def test_the_request(client: Client, server: Server, tmp_path: Path) -> None:
    argv = [b"create", b"", b"\xff\xfe", "grün".encode(), b"a\nb", b"-p", b"x" * 70000]
    wanted = {
        b"TERM": b"xterm\xff",
        b"COLUMNS": b"80",
        b"LINES": b"",
        b"NO_COLOR": b"1",
        b"FORCE_COLOR": b"a=b=c",
        b"LANG": b"C",
        b"LC_ALL": b"C.UTF-8",
        b"LC_CTYPE": b"C",
        b"CHAOS_X": b"y",
        b"CHAOS_SOCKET": os.fsencode(client.env["CHAOS_SOCKET"]),
    }
    other = {
        b"PATH": b"/bin",
        b"SECRET": b"s",
        b"TERMINAL": b"t",
        b"XCHAOS_": b"",
        b"LC_TIME": b"C",
    }
    folder = tmp_path / os.fsdecode(b"odd \xff folder")
    folder.mkdir()
    process = client.start(*argv, env=wanted | other, cwd=folder)
    with server.accept() as connection:
        assert requested(connection) == {
            "argv": argv,
            "cwd": os.fsencode(folder),
            "env": wanted,
        }
        stdin, stdout, stderr, directory = connection.descriptors
        assert process.stdin is not None
        process.stdin.write(b"to the verb")
        process.stdin.flush()
        assert os.read(stdin, 100) == b"to the verb"
        os.write(stdout, b"out")
        os.write(stderr, b"err")
        assert os.path.samestat(os.fstat(directory), folder.stat())
        (folder / "file").write_text("x")
        os.close(os.open("file", os.O_RDONLY, dir_fd=directory))
        connection.reply(frames.OK, 0)
        assert connection.receive() is None
    assert finish(process) == (0, "out", "err")


@pytest.mark.parametrize("status", [0, 1, 2, 3, 124, 127, 128, 130, 255])
def test_the_exit_status(client: Client, server: Server, status: int) -> None:
    process = client.start("list")
    with server.accept() as connection:
        requested(connection)
        connection.reply(frames.OK, status)
        assert finish(process) == (status, "", "")


def test_a_reply_that_comes_in_bytes(client: Client, server: Server) -> None:
    process = client.start("list")
    with server.accept() as connection:
        requested(connection)
        for byte in frames.pack_reply(1, frames.OK, 200):
            connection.send(bytes([byte]))
        assert finish(process)[0] == 200


@pytest.mark.parametrize("no_daemon", [None, ""])
def test_exec_runs_the_python_command(
    client: Client, server: Server, no_daemon: str | None
) -> None:
    if no_daemon is not None:
        client.env["CHAOS_NO_DAEMON"] = no_daemon
    process = client.start("top", "a b", "")
    with server.accept() as connection:
        requested(connection)
        connection.reply(frames.EXEC, None)
        before = "unset" if no_daemon is None else ""
        assert finish(process) == (7, f"python|{before}|top|a b||", "")


def test_a_daemon_that_cannot_be_reached(client: Client, server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    other.bind(str(tmp_path / "datagram"))
    server.close()
    names = ("s", "missing", "file", "file/below", "datagram", "x" * 107, "x" * 5000)
    with other:
        for name in names:
            client.env["CHAOS_SOCKET"] = f"{tmp_path}/{name}"
            assert client.run("-v", "list") == (7, "python|unset|-v|list|", ""), name


@pytest.fixture
def public(program: Path) -> Iterator[Path]:
    """A folder that other users may enter, with the client in it."""
    if os.geteuid():
        pytest.skip("becomes another user")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for path in (program, program.with_name("chaos-python")):
            shutil.copy(path, folder)
        yield folder


def test_a_socket_that_is_closed_to_us(public: Path) -> None:
    with Server(public / "s") as server:
        server.path.chmod(0o660)
        client = Client(public / "chaos", server)
        other = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "cwd": "/"}
        assert client.run("list", **other) == (7, "python|unset|list|", "")


def test_no_daemon_is_asked_for(client: Client) -> None:
    # Nobody accepts: with the daemon these would not end.
    assert client.run("--no-daemon", "list") == (7, "python|unset|--no-daemon|list|", "")
    assert client.run("-v", "--no-daemon", "x")[1] == "python|unset|-v|--no-daemon|x|"
    client.env["CHAOS_NO_DAEMON"] = "1"
    assert client.run("list") == (7, "python|1|list|", "")


@pytest.mark.parametrize("argv", [["list", "--no-daemon"], ["--no-daemonx"], ["--no-daemo"], ["-"]])
def test_what_is_not_that_option(client: Client, server: Server, argv: list[str]) -> None:
    process = client.start(*argv)
    with server.accept() as connection:
        assert requested(connection)["argv"] == [word.encode() for word in argv]
        connection.reply(frames.OK, 0)
        assert finish(process)[0] == 0


def test_the_python_command_is_found_on_path(client: Client, program: Path, tmp_path: Path) -> None:
    alone, elsewhere = tmp_path / "alone", tmp_path / "elsewhere"
    alone.mkdir()
    elsewhere.mkdir()
    client.program = alone / "chaos"
    client.program.write_bytes(program.read_bytes())
    client.program.chmod(0o755)
    said = "chaos: cannot run chaos-python, neither beside this command nor on PATH"
    missing = (1, "", f"{said} (install chaos-xen again)\n")
    (elsewhere / "chaos-python").symlink_to(program.with_name("chaos-python"))
    # A relative folder is not searched: whoever calls chaos in it did not choose what lies there.
    for path in ("", ":", "/nonexistent::/usr/bin", f"/{'x' * 5000}", ".", "elsewhere"):
        client.env["PATH"] = path
        assert client.run("--no-daemon", "list", cwd=tmp_path) == missing
    del client.env["PATH"]
    assert client.run("--no-daemon", "list") == missing
    client.env["PATH"] = f"/nonexistent:{elsewhere}:/usr/bin"
    assert client.run("--no-daemon", "list")[0] == 7
    link = tmp_path / "link"
    link.symlink_to(program)
    client.program, client.env["PATH"] = link, ""
    assert client.run("--no-daemon", "list")[0] == 7, "beside what a link leads to"


@pytest.mark.parametrize(
    ("value", "status", "said"),
    [
        (("ChaosError", "too many clients", "", 1), 1, "chaos: too many clients\n"),
        (("UsageError", "grün", "so: nicht", 2), 2, "chaos: grün (so: nicht)\n"),
        (("X", "m" * 300, "h" * 70000, 255), 255, f"chaos: {'m' * 300} ({'h' * 70000})\n"),
    ],
)
def test_an_error_of_the_daemon(
    client: Client, server: Server, value: tuple[Any, ...], status: int, said: str
) -> None:
    error = dict(zip(("class", "message", "hint", "exit_code"), value, strict=True))
    for extra in ({}, {"step": "unpause", "errno": 3, "more": {"a": [1]}}):
        process = client.start("list")
        with server.accept() as connection:
            requested(connection)
            connection.reply(frames.ERROR, error | extra)
            assert finish(process) == (status, "", said)


def test_an_error_before_the_request_is_read(client: Client, server: Server) -> None:
    with server:
        process = client.start("x" * 100000, *["y" * 100000] * 5)
        with server.accept() as connection:
            error = {"class": "ProtocolError", "message": "no", "hint": "", "exit_code": 1}
            connection.reply(frames.ERROR, error, ident=0)
        assert finish(process) == (1, "", "chaos: no\n")


BAD_ERROR = {"class": "X", "message": "m", "hint": "", "exit_code": 1}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x93",
        b"\x93\x01\x00",
        b"\xc1",
        b"\x92\x01\x00",
        b"\x94\x01\x00\x00\x00",
        b"\x93\x02\x00\x00",
        b"\x93\x00\x00\x00",
        b"\x93\x01\x02\x00",
        b"\x93\x01\x04\x00",
        b"\x93\x01\x00\xc0",
        b"\x93\x01\x00\xff",
        b"\x93\x01\x00\xcd\x01\x00",
        b"\x93\x01\x00\xcc",
        b"\x93\x01\x00\x00\x00",
        b"\x93\x01\x01\xc0",
        b"\x93\x01\x01\x84\xa5class\xdb\xff\xff\xff\xff",
        b"\x93\x01\x01\x84\xa5class\xdc\x00\x00",
        frames.pack_reply(1, frames.ERROR, BAD_ERROR)[4:-1],
        frames.pack_reply(1, frames.ERROR, BAD_ERROR | {"exit_code": 0})[4:],
        frames.pack_reply(1, frames.ERROR, BAD_ERROR | {"exit_code": 256})[4:],
        frames.pack_reply(1, frames.ERROR, BAD_ERROR | {"exit_code": -1})[4:],
        frames.pack_reply(1, frames.ERROR, BAD_ERROR | {"message": None})[4:],
        frames.pack_reply(1, frames.ERROR, {"message": "m"})[4:],
    ],
)
def test_a_malformed_reply(client: Client, server: Server, body: bytes) -> None:
    process = client.start("list")
    with server.accept() as connection:
        requested(connection)
        connection.send(frames.LENGTH.pack(len(body)) + body)
        assert finish(process) == (1, "", MALFORMED)


@pytest.mark.parametrize("size", [frames.FRAME_MAX + 1, 0xFFFFFFFF, 0xFFFFFFFC])
def test_a_reply_too_long(client: Client, server: Server, size: int) -> None:
    process = client.start("list")
    with server.accept() as connection:
        requested(connection)
        connection.send(frames.LENGTH.pack(size))
        assert finish(process) == (1, "", MALFORMED)


def test_more_than_a_reply(client: Client, server: Server) -> None:
    process = client.start("list")
    with server.accept() as connection:
        requested(connection)
        connection.send(frames.pack_reply(1, frames.OK, 0) + b"x")
        assert finish(process) == (1, "", MALFORMED)


@pytest.mark.parametrize("sent", [b"", b"\x04", b"\x04\0\0\0\x93\x01\x00"])
def test_the_daemon_goes_away(client: Client, server: Server, sent: bytes) -> None:
    process = client.start("list")
    connection = server.accept()
    requested(connection)
    connection.send(sent)
    connection.close()
    assert finish(process) == (1, "", GONE)
    process = client.start("list")
    server.accept().close()
    assert finish(process) == (1, "", GONE)


def test_signals_are_forwarded(client: Client, server: Server) -> None:
    process = client.start("wait", "x")
    with server.accept() as connection:
        requested(connection)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            process.send_signal(number)
            told = connection.receive()
            assert told is not None
            assert told == (0, "signal", {"id": 1, "signal": number})
        connection.reply(frames.OK, 130)
        assert connection.receive() is None
        assert finish(process) == (130, "", "")


def test_a_signal_that_is_ignored_stays_so(client: Client, server: Server) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = client.start("wait", preexec_fn=ignore)
    with server.accept() as connection:
        requested(connection)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        told = connection.receive()
        assert told is not None
        assert told.params["signal"] == signal.SIGTERM
        connection.reply(frames.OK, 0)
        assert finish(process)[0] == 0


def test_a_signal_while_the_request_goes_out(client: Client, server: Server) -> None:
    argv = ["x" * 100000] * 9  # more than a socket holds
    process = client.start(*argv)
    with server.accept() as connection:
        wait_for(lambda: in_system_call(process.pid, SYS_SENDMSG))
        process.send_signal(signal.SIGINT)
        assert requested(connection)["argv"] == [word.encode() for word in argv]
        assert connection.receive() == (0, "signal", {"id": 1, "signal": signal.SIGINT})
        connection.reply(frames.OK, 130)
        assert finish(process)[0] == 130


def test_a_signal_while_it_connects(client: Client, tmp_path: Path) -> None:
    """It waits for the daemon, and then has the verb end."""
    with Server(tmp_path / "full", backlog=0) as server:
        client.env["CHAOS_SOCKET"] = str(server.path)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(server.path))  # the backlog has room for one
            process = client.start("wait")
            wait_for(lambda: in_system_call(process.pid, SYS_CONNECT))
            process.send_signal(signal.SIGINT)
            server.accept().close()
            with server.accept() as connection:
                requested(connection)
                assert connection.receive() == (0, "signal", {"id": 1, "signal": signal.SIGINT})
                connection.reply(frames.OK, 130)
                assert finish(process)[0] == 130


def test_quit_and_kill_end_it_at_once(client: Client, server: Server) -> None:
    for number in (signal.SIGQUIT, signal.SIGKILL):
        process = client.start("wait")
        with server.accept() as connection:
            requested(connection)
            process.send_signal(number)
            assert connection.receive() is None
            assert finish(process)[0] == -number


def test_a_signal_before_exec(client: Client, server: Server) -> None:
    process = client.start("top")
    with server.accept() as connection:
        requested(connection)
        process.send_signal(signal.SIGTERM)
        assert connection.receive() is not None
        connection.reply(frames.EXEC, None)
        assert finish(process) == (128 + signal.SIGTERM, "", "")


def test_the_python_command_gets_default_signals(
    client: Client, server: Server, program: Path, tmp_path: Path
) -> None:
    client.program = tmp_path / "chaos"
    client.program.write_bytes(program.read_bytes())
    client.program.chmod(0o755)
    python = tmp_path / "chaos-python"
    python.write_text("#!/bin/sh\ngrep -E 'Sig(Cgt|Ign|Blk)' /proc/self/status\n")
    python.chmod(0o755)
    before = client.run("--no-daemon")
    process = client.start("top")
    with server.accept() as connection:
        requested(connection)
        connection.reply(frames.EXEC, None)
        assert finish(process) == before


def test_stop_and_continue(client: Client, server: Server) -> None:
    process = client.start("wait")
    with server.accept() as connection:
        requested(connection)
        process.send_signal(signal.SIGSTOP)
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        process.send_signal(signal.SIGCONT)
        assert os.WIFCONTINUED(os.waitpid(process.pid, os.WCONTINUED)[1])
        connection.reply(frames.OK, 5)
        assert finish(process)[0] == 5


@pytest.mark.parametrize("closed", [[0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2]])
def test_closed_standard_streams(client: Client, server: Server, closed: list[int]) -> None:
    def close() -> None:
        for fd in closed:
            os.close(fd)

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = client.start("list", preexec_fn=close, **streams)
    with server.accept() as connection:
        requested(connection)
        *standard, directory = connection.descriptors
        assert [fd for fd in range(3) if is_null(standard[fd])] == closed
        assert os.path.samestat(os.fstat(directory), os.stat("."))
        os.write(standard[1], b"no error")
        connection.reply(frames.OK, 3)
        assert finish(process)[0] == 3


def test_a_terminal(client: Client, server: Server) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (11, 22))
    process = client.start("console", stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    with server.accept() as connection:
        requested(connection)
        stdin, stdout, _, _ = connection.descriptors
        assert os.isatty(stdin)
        assert termios.tcgetwinsize(stdout) == (11, 22)
        os.write(stdout, b"hello\n")
        assert os.read(ours, 100) == b"hello\r\n"
        connection.reply(frames.OK, 0)
        assert finish(process)[0] == 0
    os.close(ours)


def test_ctrl_c_at_a_terminal(client: Client, server: Server) -> None:
    pid, ours = pty.fork()
    if not pid:
        try:
            os.execve(client.program, ["chaos", "wait"], client.env)
        finally:
            os._exit(99)
    with server.accept() as connection:
        requested(connection)
        os.write(ours, b"\x03")
        assert connection.receive() == (0, "signal", {"id": 1, "signal": signal.SIGINT})
        connection.reply(frames.OK, 130)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(ours)


def test_a_terminal_is_itself_again_when_the_daemon_goes_away(
    client: Client, server: Server
) -> None:
    pid, ours = pty.fork()
    if not pid:
        try:
            os.execve(client.program, ["chaos", "console", "g"], client.env)
        finally:
            os._exit(99)
    before = termios.tcgetattr(ours)
    with server.accept() as connection:
        requested(connection)
        tty.setraw(connection.descriptors[0])
        assert termios.tcgetattr(ours) != before
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert termios.tcgetattr(ours) == before
    os.close(ours)


def test_a_long_command_line(client: Client, server: Server) -> None:
    room = frames.FRAME_MAX - len(
        frames.pack_request(1, "run", {"argv": [], "cwd": b"/", "env": {}})
    )
    # Each item has 5 bytes of head; so have the empty containers, instead of 1 or 2.
    client.env = {"CHAOS_SOCKET": client.env["CHAOS_SOCKET"]}
    entry = 10 + sum(map(len, client.env)) + sum(map(len, client.env.values()))
    room -= 4 + 4 + 3 + entry - 4
    words = ["x" * 60000] * (room // 60005 - 1)  # a word's limit is 128 KiB
    words.append("y" * (room - 60005 * len(words) - 5))
    process = client.start(*words, cwd="/")
    with server.accept() as connection:
        assert requested(connection)["argv"] == [word.encode() for word in words]
        connection.reply(frames.OK, 0)
        assert finish(process) == (0, "", "")
    words[-1] += "y"
    said = "chaos: the command line is longer than the 1 MiB that chaosd takes"
    process = client.start(*words, cwd="/")
    with server.accept() as connection:
        assert finish(process) == (2, "", f"{said} (chaos --no-daemon takes it)\n")
        assert connection.receive() is None
    assert client.run("--no-daemon", *words, cwd="/")[0] == 7


def test_a_working_directory_that_is_removed(
    client: Client, server: Server, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    process = client.start("list", cwd=folder, preexec_fn=folder.rmdir)
    with server.accept() as connection:
        assert requested(connection)["cwd"] == b""
        with pytest.raises(FileNotFoundError):
            os.open("x", os.O_RDONLY, dir_fd=connection.descriptors[3])
        connection.reply(frames.OK, 0)
        assert finish(process)[0] == 0


def test_a_working_directory_with_a_long_path(
    client: Client, server: Server, tmp_path: Path
) -> None:
    name = "d" * 250

    def descend() -> None:
        for _ in range(20):
            os.mkdir(name)
            os.chdir(name)

    process = client.start("list", cwd=tmp_path, preexec_fn=descend)
    with server.accept() as connection:
        assert requested(connection)["cwd"] == b""
        connection.reply(frames.OK, 0)
        assert finish(process)[0] == 0


def test_a_working_directory_closed_to_us(public: Path) -> None:
    shut = public / "shut"
    shut.mkdir(mode=0o700)

    def enter() -> None:
        os.chdir(shut)
        os.setuid(NOBODY)

    with Server(public / "s") as server:
        server.path.chmod(0o777)
        process = Client(public / "chaos", server).start("list", preexec_fn=enter)
        connection = server.accept()
        assert requested(connection)["cwd"] == os.fsencode(shut)
        with pytest.raises(NotADirectoryError):
            os.open("x", os.O_RDONLY, dir_fd=connection.descriptors[3])
        connection.reply(frames.OK, 0)
        assert finish(process)[0] == 0
