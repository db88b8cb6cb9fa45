"""The template: a process that has all imports behind it, from which shell makers are forked.

::

    daemon                         template                        maker
      | one end of a channel  --->  fork, which forks  --->         |
      |                                                   the daemon is its parent
      | <-------------------------------------- its pid, then that it is ready

To import what a maker needs takes longer than all else at its start. The first template is forked
from the daemon while that has neither threads nor handles; one that ended is replaced by a new
process. A maker comes of two forks, so that it is inherited by the daemon (a child subreaper of
prctl(2)): it outlives its template, and the daemon learns how it ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import socket
import sys
import traceback
from importlib import import_module
from typing import TYPE_CHECKING

from chaos.daemon import maker
from chaos.daemon.maker import NICE
from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from typing import NoReturn

COMMAND = (sys.executable, "-P", "-m", "chaos.daemon.template")
NAME = b"chaosd-template"
SHARED = (
    "noxs.bus",
    "xenctypes.ctrl",
    "xenctypes.evtchn",
    "xenctypes.foreignmemory",
    "xenctypes.host",
)
"""What a maker and the daemon import where they first need it."""
MODULES = (*SHARED, "hashlib", "xenctypes.guest")
"""What a maker imports so."""
LIBRARIES = ("xenctrl", "xenevtchn", "xenforeignmemory", "xenguest")
PR_SET_PDEATHSIG, PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 1, 15, 36
END_SECONDS = 5.0


class Template:
    """The daemon's end. It costs nothing before ``fork`` or the first ``make``."""

    def __init__(self, run_dir: str) -> None:
        self.pid = 0
        self._run_dir = run_dir
        self._socket: socket.socket | None = None

    def fork(self) -> None:
        """Fork it from this process, which must have no threads and no secrets. OSError."""
        for name in SHARED:
            import_module(name)
        parent = os.getpid()
        ours, theirs = self._pair()
        self.pid = os.fork()
        if not self.pid:
            _run(theirs.fileno(), parent, self._run_dir)
        theirs.close()
        self._socket = ours

    def _execute(self) -> None:
        """Start it as a process of its own: the daemon has threads by now."""
        ours, theirs = self._pair()
        with theirs:
            os.set_inheritable(theirs.fileno(), True)
            words = [*COMMAND, str(theirs.fileno()), str(os.getpid()), self._run_dir]
            self.pid = os.posix_spawn(words[0], words, os.environ)
        self._socket = ours

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), "prctl")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        return ours, theirs

    def make(self, channel: socket.socket) -> int:
        """Have a maker forked that serves ``channel``; the pid of the template that is asked.

        Does not wait: if it fails the channel is closed. Raises OSError if nobody can be asked.
        """
        try:
            self._send(channel)
        except OSError:  # it is gone, or does not read
            self.close()
            self._send(channel)
        return self.pid

    def give_up(self, pid: int) -> None:
        """End the template of that pid, if it is this one still: its makers do not start."""
        if pid == self.pid:
            self.close()

    def _send(self, channel: socket.socket) -> None:
        if self._socket is None:
            self._execute()
        assert self._socket is not None
        socket.send_fds(self._socket, [b"make"], [channel.fileno()])

    def close(self) -> None:
        """End it; its makers go on. Idempotent."""
        pid, self.pid = self.pid, 0
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if pid:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)


def _run(fd: int, parent: int, run_dir: str) -> NoReturn:
    """Be the template, until the daemon closes its end."""
    status = 1
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_NAME, NAME, 0, 0, 0)
        if os.getppid() == parent:
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)  # the daemon's to handle
            os.nice(NICE)  # the daemon comes first, and makers are told when somebody waits
            _prepare(fd)
            _serve(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, fileno=fd), parent, run_dir)
        status = 0
    except BaseException:  # noqa: BLE001 - nothing of the daemon's may run in this process
        traceback.print_exc()
    finally:
        os._exit(status)


def _prepare(channel: int) -> None:
    """Have ready what a maker would wait for, and nothing open but the channel."""
    os.closerange(3, channel)
    os.closerange(channel + 1, os.sysconf("SC_OPEN_MAX"))
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):
        os.dup2(null, fd)
    os.close(null)
    for name in MODULES:
        import_module(name)
    from xenctypes import loader

    for name in LIBRARIES:
        with contextlib.suppress(ChaosError):  # makers will say so
            loader.load(name)
    gc.freeze()  # shared with the daemon and the makers for as long as nobody writes to it


def _serve(channel: socket.socket, parent: int, run_dir: str) -> None:
    while True:
        message, fds, _, _ = socket.recv_fds(channel, 16, 1)
        if not message:
            return
        try:
            for fd in fds:
                _fork_maker(fd, channel, parent, run_dir)
        except OSError as error:
            sys.stderr.write(f"chaosd: no shell maker can be forked: {error.strerror}\n")
        finally:
            for fd in fds:
                os.close(fd)


def _fork_maker(fd: int, channel: socket.socket, parent: int, run_dir: str) -> None:
    go, gone = os.pipe()
    try:
        between = os.fork()
        if not between:
            os.close(gone)
            _fork_again(fd, channel, go, parent, run_dir)
        os.waitpid(between, 0)
    finally:
        os.close(go)
        os.close(gone)  # the maker, if there is one, is the daemon's now


def _fork_again(fd: int, channel: socket.socket, go: int, parent: int, run_dir: str) -> NoReturn:
    status = 1
    try:
        if os.fork():
            os._exit(0)
        channel.close()
        os.read(go, 1)
        os.close(go)
        status = maker.main(fd, parent, run_dir)
    except BaseException:  # noqa: BLE001 - nothing of the template's may run in this process
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    _run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
