"""The host's end of a command channel: one session, commands run in it one by one."""

import contextlib
import fcntl
import json
import os
import secrets
import selectors
import signal
import struct
import sys
import termios
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO, Self

from lab import machine as machines
from lab.errors import ChannelBusy, Crash, LabError, TimedOut
from lab.frames import NONCE_SIZE, Decoder, Frame, Kind, Sync, encode, encode_all
from lab.machine import CHANNELS, Machine
from lab.serial import SerialLog

CHUNK = 32 << 10
BACKLOG = 256 << 10
TICK_SECONDS = 0.25
"""How often the serial log and QEMU itself are looked at."""

BOOT_SECONDS = 240.0
RECONNECT_SECONDS = 5.0
"""QEMU 7.2 now and then takes no notice of a connection that follows closely on another: the port
stays closed for Dom0 (host_connected in debugfs) until somebody connects once more."""
HANG_SECONDS = 60.0
"""Without a sign of life from Dom0 (it sends one every two seconds) before it counts as hung."""


@dataclass(frozen=True)
class Request:
    """A command for Dom0."""

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/src"
    terminal: bool = False
    timeout: float | None = None
    hang: float = HANG_SECONDS


class Session:
    """A synchronised channel. A context manager: leaving it ends what still runs in it."""

    def __init__(
        self, machine: Machine, *, channel: int | None = None, booting: bool = False
    ) -> None:
        self._machine = machine
        self._log = SerialLog(machine.serial)
        self._lock, self._number = _claim(machine, channel)
        self._decoder = Decoder(bytes.fromhex(machine.token))
        self._out = bytearray()
        self._heard = time.monotonic()
        self._selector = selectors.DefaultSelector()
        try:
            self._connect()
            self._synchronise(BOOT_SECONDS if booting else HANG_SECONDS)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the channel."""
        with contextlib.suppress(AttributeError):
            self._socket.close()
        self._selector.close()
        self._lock.close()

    def _connect(self) -> None:
        while True:
            try:
                connection = machines.connect(self._machine, self._number)
            except (FileNotFoundError, ConnectionRefusedError):
                # QEMU makes the sockets right after it starts, and not if it fails.
                self._check()
                time.sleep(0.02)
            else:
                connection.setblocking(False)
                self._socket = connection
                self._selector.register(connection, selectors.EVENT_READ)
                return

    def _synchronise(self, limit: float) -> None:
        nonce = secrets.token_bytes(NONCE_SIZE)
        hello = bytes.fromhex(self._machine.token) + nonce
        self._out += hello
        now = time.monotonic()
        deadline, patience = now + limit, now + RECONNECT_SECONDS
        while True:
            for item in self._exchange():
                if isinstance(item, Sync) and item.nonce == nonce:
                    self._heard = time.monotonic()
                    return
            if time.monotonic() > deadline:
                raise Crash(f"Dom0 did not answer within {limit:.0f} s", self._log.tail())
            self._check()
            if time.monotonic() > patience:
                self._selector.unregister(self._socket)
                self._socket.close()
                self._connect()
                self._out[:] = hello
                patience = time.monotonic() + RECONNECT_SECONDS

    def _check(self) -> None:
        """Raise Crash if the machine is dead."""
        sign = self._log.crash()
        if not sign and not self._machine.alive():
            sign = self._log.crash() or "QEMU ended"
            with contextlib.suppress(OSError):
                said = (self._machine.folder / "qemu.log").read_text(errors="replace").strip()
                sign += f": {said.splitlines()[-1]}" if said else ""
        if sign:
            raise Crash(sign, self._log.tail())

    def _exchange(self) -> list[Frame | Sync]:
        """Wait for up to a tick; write what waits, return what came from Dom0."""
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
        self._selector.modify(self._socket, wanted)
        items: list[Frame | Sync] = []
        self._ready = self._selector.select(TICK_SECONDS)
        for key, events in self._ready:
            if key.fileobj is not self._socket:
                continue
            if events & selectors.EVENT_WRITE:
                with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                    del self._out[: self._socket.send(self._out[:CHUNK])]
            if events & selectors.EVENT_READ:
                try:
                    data = self._socket.recv(CHUNK)
                except ConnectionResetError:
                    data = b""
                if not data:
                    self._machine.wait(2)
                    self._check()
                    raise Crash("QEMU closed the command channel", self._log.tail())
                self._heard = time.monotonic()
                items += self._decoder.feed(data)
        return items

    def power_off(self) -> None:
        """Ask Dom0 to power off and wait until it did or takes too long."""
        self._out += encode(Kind.POWEROFF)
        with contextlib.suppress(Crash):
            deadline = time.monotonic() + 20
            while self._machine.alive() and time.monotonic() < deadline:
                self._exchange()

    def run(self, request: Request, stdin: int | None = None, *, quiet: bool = False) -> int:
        """Run a command, its streams joined to ours; return its exit status.

        Death by signal n is 128 + n, a command that cannot be found 127, one that cannot
        be run 126, as shells have it. ``stdin`` is a descriptor or None for an empty
        input. Raises Crash when the lab dies, TimedOut when ``request.timeout`` passes.
        With ``quiet`` the command's output is kept, and shown if it fails.
        """
        if request.terminal:
            assert stdin is not None
            with raw_terminal(stdin):
                return self._run(request, stdin, quiet=quiet)
        return self._run(request, stdin, quiet=quiet)

    def _run(self, request: Request, stdin: int | None, *, quiet: bool) -> int:
        start: dict[str, object] = {
            "argv": list(request.argv),
            "env": dict(request.env),
            "cwd": request.cwd,
        }
        if request.terminal:
            start["rows"], start["columns"] = _window()
        try:
            self._out += encode(Kind.START, json.dumps(start).encode())
        except ValueError:
            raise LabError("the command line and its environment are too long") from None
        if stdin is None:
            self._out += encode(Kind.STDIN)
        kept = bytearray()
        deadline = time.monotonic() + request.timeout if request.timeout else None
        with _signals(self, terminal=request.terminal) as wake:
            self._selector.register(wake, selectors.EVENT_READ)
            self._stdin = stdin
            try:
                while True:
                    status = self._turn(kept if quiet else None)
                    if status is not None:
                        if quiet and status:
                            _write_all(2, bytes(kept))
                        return status
                    self._check()
                    now = time.monotonic()
                    if now - self._heard > request.hang:
                        raise Crash(
                            f"Dom0 hangs: silent for {request.hang:g} s",
                            self._log.interrogation(self._machine.serial_socket),
                        )
                    if deadline and now > deadline:
                        raise TimedOut(
                            f"time-out: the command still ran after {request.timeout:g} s",
                            self._log.tail(),
                        )
            finally:
                self._selector.unregister(wake)
                self._watch_stdin(want=False)

    def _turn(self, kept: bytearray | None) -> int | None:
        """One round of the loop: the command's exit status if it ended."""
        self._watch_stdin(want=self._stdin is not None and len(self._out) < BACKLOG)
        for item in self._exchange():
            if not isinstance(item, Frame):
                continue
            if item.kind in (Kind.STDOUT, Kind.STDERR):
                if kept is not None:
                    kept += item.payload
                else:
                    _write_all(1 if item.kind == Kind.STDOUT else 2, item.payload)
            elif item.kind == Kind.EXIT:
                code = int(struct.unpack("<i", item.payload)[0])
                return code if code >= 0 else 128 - code
            elif item.kind == Kind.FAILED:
                print(f"lab: {item.payload[4:].decode(errors='replace')}", file=sys.stderr)
                return int(struct.unpack("<i", item.payload[:4])[0])
        for key, _ in self._ready:
            if key.fileobj == self._stdin and self._stdin is not None:
                self._read_stdin()
            elif key.fileobj is not self._socket:
                assert isinstance(key.fileobj, int)
                with contextlib.suppress(BlockingIOError):
                    os.read(key.fileobj, 64)
        return None

    def _read_stdin(self) -> None:
        assert self._stdin is not None
        try:
            data = os.read(self._stdin, CHUNK)
        except OSError:
            data = b""
        if data:
            self._out += encode_all(Kind.STDIN, data)
        else:
            self._out += encode(Kind.STDIN)
            self._watch_stdin(want=False)
            self._stdin = None

    def _watch_stdin(self, *, want: bool) -> None:
        if self._stdin is None:
            return
        watched = self._stdin in self._selector.get_map()
        if want and not watched:
            try:
                self._selector.register(self._stdin, selectors.EVENT_READ)
            except PermissionError:
                # epoll refuses regular files, which are always ready.
                self._read_stdin()
        elif watched and not want:
            self._selector.unregister(self._stdin)

    def send_signal(self, number: int) -> None:
        """Queue a signal for the command's process group."""
        self._out += encode(Kind.SIGNAL, bytes([number]))

    def send_window(self) -> None:
        """Queue the terminal's new size."""
        self._out += encode(Kind.WINDOW, struct.pack("<2H", *_window()))


def _claim(machine: Machine, channel: int | None) -> tuple[IO[str], int]:
    """Lock a free channel (or ``channel``) for this process."""
    for number in range(1, CHANNELS) if channel is None else [channel]:
        lock = (machine.folder / f"channel.{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            return lock, number
    raise ChannelBusy(f"{CHANNELS - 1} commands run in this lab already", hint="wait for one")


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _window() -> tuple[int, int]:
    """Rows and columns of the terminal that we run in."""
    for fd in (0, 1, 2):
        with contextlib.suppress(OSError):
            size = os.get_terminal_size(fd)
            return size.lines, size.columns
    return 24, 80


@contextmanager
def raw_terminal(fd: int) -> Iterator[None]:
    """Put the terminal into raw mode for the block."""
    before = termios.tcgetattr(fd)
    tty.setraw(fd)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


@contextmanager
def _signals(session: Session, *, terminal: bool) -> Iterator[int]:
    """Pass signals on to Dom0 for the block; yields a descriptor that wakes the loop.

    The first Ctrl-C is SIGINT there, the second SIGTERM, the third SIGKILL; after that
    it interrupts this process.
    """
    ladder = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]

    def interrupt(number: int, _: object) -> None:
        if not ladder:
            raise KeyboardInterrupt
        session.send_signal(ladder.pop(0) if number == signal.SIGINT else number)

    handlers = {signal.SIGINT: interrupt, signal.SIGQUIT: interrupt}
    if terminal:
        handlers[signal.SIGWINCH] = lambda *_: session.send_window()
    wake, ring = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    old = signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    try:
        yield wake
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake)
        os.close(ring)
