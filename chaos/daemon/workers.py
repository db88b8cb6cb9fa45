"""The daemon's end of the shell makers: their processes, their requests, their deaths."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import signal
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgpack

import xenctypes.errors
from chaos.daemon.maker import MESSAGE_MAX, NICE
from xenctypes.errors import ChaosError, ConfigError, ImageError, XenError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DELAYS = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before a maker that died is replaced, by how many died in a row."""
KILL_PATIENCE = 5.0
END_PATIENCE = 1.0
PATIENCE = 120.0
"""Seconds for one request, or to start, after which a maker counts as hung."""


class MakerDied(XenError):
    """A maker ended in the middle of a request: what it was making is for the daemon to reap."""


class Job(NamedTuple):
    """A request that waits for its maker, packed."""

    request: bytes
    fds: Sequence[int]
    urgent: bool
    told: Callable[[str], None] | None
    answer: asyncio.Future[dict[str, Any]]


class Forks(Protocol):
    """What a worker needs of a Template."""

    def make(self, channel: socket.socket) -> int: ...  # noqa: D102 - as Template's
    def give_up(self, pid: int) -> None: ...  # noqa: D102


class Worker:
    """One maker process. Jobs are done one at a time, urgent ones first.

    ``pid`` is 0 until it has said it, ``status`` its wait status once it has ended.
    """

    def __init__(
        self, template: Forks, ended: Callable[[Worker], None], idle: Callable[[], None]
    ) -> None:
        self._template = template
        self._forked_by = 0
        self._ended = ended
        self._idle = idle
        self._loop = asyncio.get_running_loop()
        self.jobs: deque[Job] = deque()
        self.job: Job | None = None
        self.ready = False
        self.over = False
        self.pid = 0
        self.status: int | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._pidfd = -1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            ours.setsockopt(socket.SOL_SOCKET, option, 2 * MESSAGE_MAX)
            theirs.setsockopt(socket.SOL_SOCKET, option, 2 * MESSAGE_MAX)
        ours.setblocking(False)
        self._socket = ours
        self._timer = self._loop.call_later(PATIENCE, self._hung)
        self._loop.add_reader(ours.fileno(), self._readable)
        with theirs:
            try:
                self._forked_by = template.make(theirs)
            except OSError as error:
                why = f"it cannot be started: {error.strerror}"
                self._loop.call_soon(self._fail, why)

    @property
    def idle(self) -> bool:
        """Whether it would begin with a job at once."""
        return self.ready and self.job is None and not self.jobs

    def ask(
        self,
        request: dict[str, Any],
        fds: Sequence[int] = (),
        *,
        urgent: bool = False,
        told: Callable[[str], None] | None = None,
    ) -> asyncio.Future[dict[str, Any]]:
        """Have something done. The future has the maker's values, or its error.

        ``told`` is called with the name of each step that is done.
        The descriptors stay the caller's, and must stay open until the answer is there.
        """
        packed = msgpack.packb(request | {"tell": told is not None})
        job = Job(packed, fds, urgent, told, self._loop.create_future())
        if len(job.request) > MESSAGE_MAX:
            job.answer.set_exception(_too_long(job))
            return job.answer
        if self._socket.fileno() < 0:
            job.answer.set_exception(MakerDied("a shell maker failed: it is gone"))
            return job.answer
        if urgent:
            self.jobs.insert(sum(each.urgent for each in self.jobs), job)
            if self.job is not None and not self.job.urgent:
                _set_priority(self.pid, 0)  # somebody waits behind it now
        else:
            self.jobs.append(job)
        self._next()
        return job.answer

    def end(self, why: str) -> None:
        """Kill the process, wait until it is gone, and fail what was asked of it."""
        self._close()
        if self._pidfd >= 0:
            poll = select.poll()
            poll.register(self._pidfd, select.POLLIN)
            if poll.poll(KILL_PATIENCE * 1000):
                self._reap()
        self._fail(why)

    def _close(self) -> None:
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()
        if self._timer is not None:
            self._timer.cancel()
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._loop.add_reader(self._pidfd, self._reap)

    def _reap(self) -> None:
        """Take the status of the process, which has ended."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
            with contextlib.suppress(ChildProcessError):
                _, self.status = os.waitpid(self.pid, os.WNOHANG)

    def _next(self) -> None:
        if self.job is not None or not self.ready or not self.jobs:
            return
        job = self.job = self.jobs.popleft()
        _set_priority(self.pid, 0 if job.urgent else NICE)
        self._timer = self._loop.call_later(PATIENCE, self._hung)
        try:
            socket.send_fds(self._socket, [job.request], job.fds)
        except OSError as error:
            if error.errno == errno.EMSGSIZE:  # where net.core.wmem_max is small
                self._answer(None, _too_long(job))
                self._next()
                return
            self._fail(f"cannot be asked: {error.strerror}")

    def _readable(self) -> None:
        try:
            reply = self._socket.recv(MESSAGE_MAX)
        except BlockingIOError:
            return
        except OSError:
            reply = b""
        if not reply:
            self._await_end()
            return
        try:
            answer = msgpack.unpackb(reply)
            error = _error(*answer["error"]) if "error" in answer else None
            value = answer.get("ok")
            step = str(answer["done"]) if "done" in answer else ""
        except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException):
            self._fail("it sent a reply that makes no sense")
            return
        if not self.pid:
            self._meet(value)
            return
        if not self.ready:
            self.ready = True
            self._cancel_timer()
        elif step and self.job is not None and self.job.told is not None:
            self.job.told(step)
            return
        elif self.job is None or step:
            self._fail("it spoke unasked")
            return
        else:
            self._answer(value, error)
        self._next()
        if self.idle:
            self._idle()

    def _meet(self, pid: Any) -> None:
        """It has said its pid: from now on it can be killed, and waited for."""
        try:
            self._pidfd = os.pidfd_open(pid)
        except (OSError, TypeError, ValueError):
            self._fail("it was killed as it started")
        else:
            self.pid = pid

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _answer(self, value: Any, error: ChaosError | None) -> None:
        job, self.job = self.job, None
        self._cancel_timer()
        if job is not None and not job.answer.done():
            if error is not None:
                job.answer.set_exception(error)
            else:
                job.answer.set_result(value)

    def _hung(self) -> None:
        self._fail(f"it gave no answer for {PATIENCE:.0f} s")

    def _await_end(self) -> None:
        """The channel is closed: the process is about to end, and how is worth a moment."""
        self.ready = False
        self._loop.remove_reader(self._socket.fileno())
        self._cancel_timer()
        if self._pidfd < 0:
            self._fail("it did not start")
            return
        self._timer = self._loop.call_later(END_PATIENCE, self._fail, "it closed its channel")
        self._loop.add_reader(self._pidfd, self._ended_now)

    def _ended_now(self) -> None:
        self._reap()
        self._fail(self._why())

    def _why(self) -> str:
        if self.status is None:
            return "it ended"
        code = os.waitstatus_to_exitcode(self.status)
        return f"it died of {signal.Signals(-code).name}" if code < 0 else f"exit {code}"

    def _fail(self, why: str) -> None:
        """The end of this process, and of what was asked of it. Once."""
        if self.over:
            return
        self.over = True
        self._close()
        if not self.pid:
            self._template.give_up(self._forked_by)  # another one does better, perhaps
        self.ready = False
        jobs = [job for job in (self.job, *self.jobs) if job is not None]
        current, self.job = self.job, None
        self.jobs.clear()
        for job in jobs:
            if not job.answer.done():
                kind = ImageError if job is current and job.fds else MakerDied
                failure = (
                    "not a bootable image: the domain builder could not digest it, "
                    if kind is ImageError
                    else "a shell maker failed: "
                )
                job.answer.set_exception(kind(failure + why))
        self._ended(self)


def _too_long(job: Job) -> ConfigError:
    return ConfigError(
        f"the configuration is too long for a shell maker: {len(job.request)} bytes",
        hint="have fewer settings for single vCPUs",
    )


def _set_priority(pid: int, nice: int) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, nice)


def _error(kind: str, message: str, hint: str) -> ChaosError:
    found = getattr(xenctypes.errors, str(kind), XenError)
    if not (isinstance(found, type) and issubclass(found, ChaosError)):
        found = XenError
    try:
        return found(str(message)[:1000], hint=str(hint)[:400])
    except TypeError:
        return XenError(str(message)[:1000], hint=str(hint)[:400])
