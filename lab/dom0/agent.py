"""The agent in Dom0: runs commands that arrive on the lab's channels.

Each channel is a virtio-serial port with one session at a time::

    idle --sync--> ready --START--> running --command ends--> ready
      ^              |                 |
      +---- host went away (the command's process group is ended) ----+

Runs as the first process of a lab that boots without systemd, hence reaps every child. One
thread, one epoll: a stuck command or a slow reader on one channel never holds up another.
"""

import contextlib
import errno
import fcntl
import json
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

from lab.frames import BEAT_SECONDS, Decoder, Frame, Kind, Sync, encode, encode_all

BACKLOG = 256 << 10
"""Bytes queued in one direction before the source is no longer read."""

CHUNK = 32 << 10
PIPE_BYTES = 64 << 10
"""What a pipe holds unless somebody enlarged it (pipe(7))."""

GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL for the command of a client that went away."""

ENVIRONMENT = {
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "LOGNAME": "root",
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "PYTHONUNBUFFERED": "1",
    "SHELL": "/bin/bash",
    "TERM": "dumb",
    "USER": "root",
}


class Loop:
    """epoll, timers and children."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], object]] = {}
        self.children: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, Callable[[], None]]] = []
        wake, ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
        self.watch(wake, select.EPOLLIN, lambda _: self._drain(wake))

    def watch(self, fd: int, events: int, handler: Callable[[int], object]) -> None:
        """Call ``handler(events)`` when any of ``events`` happens on ``fd``."""
        self._handlers[fd] = handler
        self.epoll.register(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``."""
        if self._handlers.pop(fd, None):
            self.epoll.unregister(fd)

    def watched(self, fd: int) -> bool:
        """Whether ``fd`` is watched."""
        return fd in self._handlers

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` once after ``seconds``."""
        self._timers.append((time.monotonic() + seconds, action))

    def run(self) -> None:
        """Serve for ever."""
        while True:
            now = time.monotonic()
            wait = min((when for when, _ in self._timers), default=now + 3600) - now
            for fd, events in self.epoll.poll(max(wait, 0)):
                if handler := self._handlers.get(fd):
                    handler(events)
            self._reap()
            now = time.monotonic()
            due = [timer for timer in self._timers if timer[0] <= now]
            self._timers = [timer for timer in self._timers if timer[0] > now]
            for _, action in due:
                action()

    @staticmethod
    def _drain(fd: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(fd, 4096):
                pass

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if ended := self.children.pop(pid, None):
                    ended(os.waitstatus_to_exitcode(status))


class Command:
    """One running command with its standard streams."""

    def __init__(self, loop: Loop, port: "Port", request: dict[str, object]) -> None:
        self._loop, self._port = loop, port
        self._stdin = bytearray()
        self._stdin_ended = False
        self._outputs: dict[int, Kind] = {}
        self._status: int | None = None
        self.terminal = "rows" in request
        self.pid = self._start(request)
        loop.children[self.pid] = self._ended

    def _start(self, request: dict[str, object]) -> int:
        argv, env, cwd = request["argv"], request["env"], request["cwd"]
        assert isinstance(argv, list)
        assert isinstance(env, dict)
        assert isinstance(cwd, str)
        if self.terminal:
            master, slave = pty.openpty()
            self._input, self._outputs = master, {master: Kind.STDOUT}
            self.resize(int(str(request["rows"])), int(str(request["columns"])))
            streams = (slave, slave, slave)
        else:
            pairs = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
            streams = (pairs[0][0], pairs[1][1], pairs[2][1])
            self._input = pairs[0][1]
            self._outputs = {pairs[1][0]: Kind.STDOUT, pairs[2][0]: Kind.STDERR}
        failed, report = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if not pid:
            _become(argv, {**ENVIRONMENT, **env}, cwd, streams, self.terminal, report)
        os.close(report)
        for fd in set(streams):
            os.close(fd)
        with os.fdopen(failed, "rb") as reader:
            problem = reader.read()
        if problem:
            os.waitpid(pid, 0)
            for fd in {self._input, *self._outputs}:
                os.close(fd)
            raise OSError(struct.unpack("<i", problem)[0], argv[0])
        for fd in {self._input, *self._outputs}:
            os.set_blocking(fd, False)
        for fd in self._outputs:
            self._loop.watch(fd, select.EPOLLIN, self._reader(fd))
        return pid

    def _reader(self, fd: int) -> Callable[[int], object]:
        return lambda _: self._read(fd)

    def _read(self, fd: int) -> int:
        """Pass on what ``fd`` has; return how many bytes, 0 when there is nothing more."""
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return 0
        except OSError:
            # A terminal whose last user is gone reads as EIO (pty(7)).
            data = b""
        if not data:
            self._close(fd)
            return 0
        self._port.send(encode_all(self._outputs[fd], data))
        if self._port.congested():
            for output in self._outputs:
                self._loop.unwatch(output)
        return len(data)

    def _close(self, fd: int) -> None:
        self._loop.unwatch(fd)
        if fd in self._outputs:
            del self._outputs[fd]
            if not (self.terminal and fd == self._input):
                os.close(fd)

    def resume(self) -> None:
        """Read the outputs again: the channel has room."""
        for fd in self._outputs:
            if not self._loop.watched(fd):
                self._loop.watch(fd, select.EPOLLIN, self._reader(fd))

    def feed(self, data: bytes) -> None:
        """Queue ``data`` for the command's standard input; no data is end of file."""
        if self._input < 0:
            return
        if data:
            self._stdin += data
        elif self.terminal:
            self._stdin += b"\4"
        else:
            self._stdin_ended = True
        self._write(0)

    def hungry(self) -> bool:
        """Whether more standard input may be taken from the channel."""
        return len(self._stdin) < BACKLOG

    def _write(self, _: int) -> None:
        watched = self._loop.watched(self._input)
        try:
            while self._stdin:
                del self._stdin[: os.write(self._input, self._stdin[:CHUNK])]
        except BlockingIOError:
            if not watched:
                self._loop.watch(self._input, select.EPOLLOUT, self._write)
            return
        except OSError:
            self._stdin.clear()
            self._stdin_ended = not self.terminal
        if watched and not self.terminal:
            self._loop.unwatch(self._input)
        if self._stdin_ended:
            os.close(self._input)
            self._input = -1
        self._port.resume_reading()

    def resize(self, rows: int, columns: int) -> None:
        """Set the terminal's size; the kernel sends SIGWINCH."""
        if self.terminal:
            fcntl.ioctl(self._input, termios.TIOCSWINSZ, struct.pack("<4H", rows, columns, 0, 0))

    def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _ended(self, status: int) -> None:
        """The command is gone: send what it left in its pipes, then its status.

        Children that it left behind may hold the pipes open and write for ever, so nobody
        waits for the pipes to close, and no more is read than a pipe holds.
        """
        for fd in list(self._outputs):
            left = PIPE_BYTES
            while left > 0 and fd in self._outputs and (taken := self._read(fd)):
                left -= taken
        self.release()
        self._port.ended(status)

    def release(self) -> None:
        """Close our ends of the streams."""
        for fd in list(self._outputs):
            self._close(fd)
        if self._input >= 0:
            self._loop.unwatch(self._input)
            os.close(self._input)
            self._input = -1

    def abandon(self) -> None:
        """End the command of a client that went away."""
        self._loop.children[self.pid] = lambda _: None
        self.release()
        self.signal(signal.SIGHUP)
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        self._loop.later(GRACE_SECONDS, lambda: self.signal(signal.SIGKILL))


def _become(
    argv: list[str],
    env: dict[str, str],
    cwd: str,
    streams: tuple[int, int, int],
    terminal: bool,
    report: int,
) -> None:
    """In the child: turn into the command, or report errno and exit."""
    try:
        os.setsid()
        if terminal:
            fcntl.ioctl(streams[0], termios.TIOCSCTTY, 0)
        for target, fd in enumerate(streams):
            os.dup2(fd, target)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGPIPE, signal.SIGCHLD, signal.SIGINT, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.chdir(cwd)
        os.execvpe(argv[0], argv, env)  # noqa: S606  (what an agent is for)
    except OSError as error:
        os.write(report, struct.pack("<i", error.errno or errno.EIO))
    finally:
        os._exit(127)


class Port:
    """One channel."""

    def __init__(self, loop: Loop, device: Path, token: bytes) -> None:
        self._loop = loop
        self._token = token
        self._decoder = Decoder(token)
        self._out = bytearray()
        self._held: list[Frame] = []
        self._command: Command | None = None
        self._session: Sync | None = None
        self._fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        # Edge-triggered: a port without a host reports EPOLLHUP for as long as it is so.
        edges = select.EPOLLIN | select.EPOLLOUT | select.EPOLLHUP | select.EPOLLET
        loop.watch(self._fd, edges, self._event)
        self._read()
        self._loop.later(BEAT_SECONDS, self._tick)

    def _event(self, events: int) -> None:
        if events & select.EPOLLHUP:
            self._hang_up()
        if events & select.EPOLLOUT:
            self._flush()
        self._read()

    def _read(self) -> None:
        while not self._held:
            try:
                data = os.read(self._fd, CHUNK)
            except BlockingIOError:
                return
            if not data:
                self._hang_up()
                return
            for item in self._decoder.feed(data):
                if isinstance(item, Sync):
                    self._hang_up()
                    self._session = item
                    self.send(self._token + item.nonce)
                elif self._session:
                    self._take(item)

    def _take(self, frame: Frame) -> None:
        """Act on a frame, or hold it and all after it until the command wants input."""
        if self._held or (
            frame.kind == Kind.STDIN and self._command and not self._command.hungry()
        ):
            self._held.append(frame)
        else:
            self._act(frame)

    def resume_reading(self) -> None:
        """The command has room for input: act on what was held, then read on."""
        if self._held and self._command and self._command.hungry():
            held, self._held = self._held, []
            for frame in held:
                self._take(frame)
            self._read()

    def _act(self, frame: Frame) -> None:
        command = self._command
        match frame.kind:
            case Kind.START if command is None:
                self._start(frame.payload)
            case Kind.STDIN if command:
                command.feed(frame.payload)
            case Kind.SIGNAL if command and len(frame.payload) == 1:
                command.signal(frame.payload[0])
            case Kind.WINDOW if command and len(frame.payload) == 4:
                command.resize(*struct.unpack("<2H", frame.payload))
            case Kind.POWEROFF:
                power_off()
            case _:
                pass

    def _start(self, payload: bytes) -> None:
        request = json.loads(payload)
        try:
            self._command = Command(self._loop, self, request)
        except OSError as error:
            found = error.errno not in (errno.ENOENT, errno.ENOTDIR)
            status = struct.pack("<i", 126 if found else 127)
            text = f"{request['argv'][0]}: {os.strerror(error.errno or 0)}"
            self.send(encode(Kind.FAILED, status + text.encode()))

    def ended(self, status: int) -> None:
        """The command ended."""
        self._command = None
        self._held.clear()
        self.send(encode(Kind.EXIT, struct.pack("<i", status)))
        self._read()

    def _hang_up(self) -> None:
        self._session = None
        self._out.clear()
        self._held.clear()
        if self._command:
            self._command.abandon()
            self._command = None

    def _tick(self) -> None:
        """Tell the host that Dom0 lives, and look at the port unasked.

        The port's interrupt gets lost now and then, with both edges that it carries.
        """
        if self._session and not self._out:
            self.send(encode(Kind.BEAT))
        self._event(select.EPOLLOUT)
        self._loop.later(BEAT_SECONDS, self._tick)

    def congested(self) -> bool:
        """Whether so much waits for the host that no more should be read."""
        return len(self._out) > BACKLOG

    def send(self, data: bytes) -> None:
        """Queue ``data`` for the host."""
        if self._session:
            self._out += data
            self._flush()

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: os.write(self._fd, self._out[:CHUNK])]
        except BlockingIOError:
            return
        except OSError:
            self._hang_up()
            return
        if self._command:
            self._command.resume()


def power_off() -> None:
    """End Dom0 and with it the hypervisor. The root file system is a throw-away copy."""
    os.sync()
    os.posix_spawn("/bin/busybox", ["poweroff", "-n", "-f"], ENVIRONMENT)


def ports(count: int) -> list[Path]:
    """Device nodes of the lab's channels, in order, once the kernel has them all."""
    names: dict[str, Path] = {}
    for entry in Path("/sys/class/virtio-ports").iterdir():
        with contextlib.suppress(OSError):
            names[(entry / "name").read_text().strip()] = Path("/dev") / entry.name
    return [names[f"lab.{number}"] for number in range(count) if f"lab.{number}" in names]


def main() -> None:
    """Serve the channels for ever."""
    config = json.loads(Path("/run/lab/config.json").read_text())
    loop = Loop()
    deadline = time.monotonic() + 30
    while len(found := ports(config["channels"])) < config["channels"]:
        if time.monotonic() > deadline:
            sys.exit(f"lab agent: {len(found)} of {config['channels']} channels")
        select.select([], [], [], 0.02)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for device in found:
        Port(loop, device, bytes.fromhex(config["token"]))
    loop.run()


if __name__ == "__main__":
    main()
