"""A command that a thin client forwards: its verb, run here with the client's own descriptors.

A verb that has ``serve`` runs on the event loop, any other in a thread, with the same code as
without a daemon. The commonest command, ``create FILE [key=value...]`` from a warm shell, is
answered before anything is set up for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import select
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from chaos import frames
from chaos.cli import EXIT_INTERRUPTED, VERBS, describe_error, verb_parser
from chaos.daemon.rights import borrowed
from chaos.daemon.streams import Input, Output
from chaos.daemon.wanted import NotHere, TooLong
from chaos.invocation import Invocation
from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import TextIO

    from chaos.cli import Parser
    from chaos.daemon.core import Daemon
    from chaos.daemon.server import Connection
    from chaos.host import Host
    from chaos.registry import Registry

LOGGED = frozenset(
    [
        "create",
        "destroy",
        "shutdown",
        "reboot",
        "pause",
        "unpause",
        "rename",
        "sysrq",
        "mem-set",
        "vcpu-set",
        "network-attach",
        "network-detach",
        "block-attach",
        "block-detach",
        "console",
        "console.attach",
        "logs",
        "pool.add",
        "pool.resize",
        "pool.drain",
        "pool.remove",
    ]
)
"""Verbs and methods whose callers stand in the log: whatever changes something, or listens."""
LOGGED_MAX = 200
QUIET = frozenset(["-q", "--quiet"])
DIRECTORY = 3
"""Which of a command's descriptors is its directory; those before are its streams."""
SMALL = 1024
"""Bytes that a descriptor which polls writable takes without blocking (PIPE_BUF is 4096)."""
FLUSH_SECONDS = 1.0
"""How long an interrupted command's last words may take to be read, and descriptors to close."""
EXIT_SIGNAL = 128
SIGINT = 2


def wants_client(argv: list[str]) -> bool:
    """Whether the command is one for the client's own Python: help, and what draws on a screen."""
    words = [word for word in argv if word not in {"-v", "--verbose"}]
    if not words or words[0] not in VERBS or "-h" in argv or "--help" in argv:
        return True
    return bool(getattr(_module(words[0]), "LOCAL", False))


@functools.cache
def _module(verb: str) -> Any:
    return import_module(f"chaos.verbs.{VERBS[verb].module}")


@functools.cache
def parser_of(verb: str) -> Parser:
    """A verb's parser, made once."""
    return verb_parser(verb, _module(verb))


def log_caller(connection: Connection, what: str, words: object) -> None:
    """Say who asked for what, once the reply is out; repr keeps it on one line."""
    daemon, peer = connection.server.daemon, connection.peer

    def write() -> None:
        text = repr(words)
        text = text if len(text) <= LOGGED_MAX else f"{text[:LOGGED_MAX]}..."
        daemon.log(f"user {peer.uid}, process {peer.pid}: {what} {text}")

    daemon.loop.call_soon(write)


class Command:
    """One command of one client. ``fds`` are its streams and its directory, and are owned."""

    def __init__(
        self,
        daemon: Daemon,
        connection: Connection,
        ident: int,
        argv: list[str],
        directory: str,
        env: dict[Any, Any],
        fds: list[int],
    ) -> None:
        self.daemon = daemon
        self.connection = connection
        self.ident = ident
        self.argv = argv
        self.directory = directory
        self.env = {
            os.fsdecode(key): os.fsdecode(value)
            for key, value in env.items()
            if isinstance(key, bytes) and isinstance(value, bytes)
        }
        self.fds = fds
        self.signal = 0
        self._logged = False
        self._cancel_fd = -1
        self._task: asyncio.Task[Any] | None = None
        self._outputs: list[Output] = []

    def begin(self) -> Coroutine[Any, Any, Any] | None:
        """Answer at once if that can be, else return what is left to do. NotHere."""
        try:
            self._check_directory()
            words = [word for word in self.argv[1:] if word not in QUIET]
            if self.argv[:1] == ["create"] and words and not any(w[:1] == "-" for w in words):
                self._log(self.argv, "create")
                if self._create_now(words, quiet=len(words) < len(self.argv) - 1):
                    self.close()
                    return None
        except BaseException:
            self.close()
            raise
        self.connection.cancels[self.ident] = self.cancel
        return self._run()

    def _check_directory(self) -> None:
        """NotHere for a create whose directory has another path here: its mounts are others."""
        if "create" not in self.argv:
            return
        with borrowed(self.connection.peer):
            try:
                there = os.stat(self.directory)
            except OSError:
                raise NotHere from None
        if not os.path.samestat(there, os.fstat(self.fds[DIRECTORY])):
            raise NotHere

    def close(self) -> None:
        """Close the client's descriptors. Idempotent."""
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    # The fast path

    def _create_now(self, words: list[str], *, quiet: bool) -> bool:
        """Create from a warm shell and answer; False if there is none."""
        daemon, peer = self.daemon, self.connection.peer
        try:
            wanted = daemon.reader.read(peer, self.directory, words[0], words[1:])
            talks = wanted.warnings or not (self._writable(1) and self._writable(2))
            if talks and not quiet:
                return False
            delivery = daemon.create_now(wanted, peer)
        except TooLong:
            return False
        except ChaosError as error:
            text = describe_error(error, verbose=False)
            if not self._writable(2) or len(text) > SMALL:
                return False
            _write(self.fds[2], text)
            self._answer(error.exit_code)
            return True
        if delivery is None:
            return False
        if not quiet:
            line = f"created {delivery.config.name}, domain {delivery.shell.domid}\n"
            _write(self.fds[1], line)
        self._answer(0)
        return True

    def _writable(self, which: int) -> bool:
        poll = select.poll()
        poll.register(self.fds[which], select.POLLOUT)
        return any(event & select.POLLOUT for _, event in poll.poll(0))

    def _answer(self, status: int) -> None:
        self.connection.reply(self.ident, frames.OK, status)

    # Any verb

    def _log(self, words: list[str], name: str) -> None:
        if name in LOGGED and not self._logged:
            self._logged = True
            log_caller(self.connection, f"chaos {name.replace('.', ' ')}", words[1:])

    def cancel(self, number: int | None) -> None:
        """The client got a signal, or is gone (None): the verb shall end, and clean up."""
        self.signal = number or 1
        if self._cancel_fd >= 0:
            os.eventfd_write(self._cancel_fd, 1)
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> int | None:
        try:
            words = list(self.argv)
            verbose = False
            while words[0] in {"-v", "--verbose"}:
                verbose = True
                words.pop(0)
            # A signal may have come with the request itself.
            self._cancel_fd = os.eventfd(bool(self.signal), os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._outputs = [Output(fd) for fd in self.fds[1:3]]
            return await self._guarded(words, verbose=verbose)
        finally:
            if self._cancel_fd >= 0:
                os.close(self._cancel_fd)
                self._cancel_fd = -1
            await self._let_go()

    async def _let_go(self) -> None:
        """Close the client's descriptors where that may block; give it a moment to be done.

        Whoever reads them, or unmounts a file system, learns of the end before the client does.
        """
        fds, self.fds = self.fds, []
        outputs, self._outputs = self._outputs, []
        loop = self.daemon.loop
        closed = loop.create_future()

        def work() -> None:
            for output in outputs:
                output.join()
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(closed.set_result, None)

        for output in outputs:
            output.close()
        try:
            threading.Thread(target=work, name="close", daemon=True).start()
        except RuntimeError:  # there are too many; whoever writes still has a descriptor of his own
            for fd in fds:
                with contextlib.suppress(OSError):
                    os.close(fd)
            return
        await asyncio.wait({closed}, timeout=FLUSH_SECONDS)

    async def _guarded(self, words: list[str], *, verbose: bool) -> int:
        try:
            args = parser_of(words[0]).parse_intermixed_args(words[1:])
            # By what it means, not by how it is written: options may stand anywhere.
            self._log(words, f"pool.{args.action}" if words[0] == "pool" else words[0])
            verbose = verbose or args.verbose
            status = await self._verb(words[0], args)
            await self._drain()
        except NotHere:
            self.connection.reply(self.ident, frames.EXEC, None)
            raise
        except (KeyboardInterrupt, asyncio.CancelledError) as error:
            self.signal = self.signal or SIGINT
            notes = "".join(f"chaos: {note}\n" for note in getattr(error, "__notes__", ()))
            return await self._end(notes, self._interrupted())
        except ChaosError as error:
            text = describe_error(error, verbose=verbose)
            return await self._end(text, error.exit_code)
        except BrokenPipeError:
            return 1
        except OSError as error:
            return await self._end(f"chaos: {error.strerror or error}\n", 1)
        return status

    def _interrupted(self) -> int:
        return EXIT_INTERRUPTED if self.signal == SIGINT else EXIT_SIGNAL + self.signal

    async def _end(self, text: str, status: int) -> int:
        with contextlib.suppress(OSError, ValueError, asyncio.CancelledError):
            if text:
                self._outputs[1].write(text)
            await self._drain()
        return status

    async def _drain(self) -> None:
        """Wait until the output is read; of an interrupted command not for long. OSError."""
        self._task = self.daemon.loop.create_task(self._written())
        if self.signal:
            await asyncio.wait({self._task}, timeout=FLUSH_SECONDS)
            self._task.cancel()
        await self._task

    async def _written(self) -> None:
        drained = (output.drain() for output in self._outputs)
        for failure in await asyncio.gather(*drained, return_exceptions=True):
            if failure is not None:
                raise failure

    async def _verb(self, verb: str, args: Any) -> int:
        module = _module(verb)
        stdin = cast("TextIO", Input(self.fds[0]))
        stdout, stderr = (cast("TextIO", output) for output in self._outputs)
        call = Invocation(
            args,
            self.daemon.host,
            self.daemon.names,
            self.directory,
            stdin,
            stdout,
            stderr,
            self.env,
            self._cancel_fd,
            daemon=self.daemon,
            peer=self.connection.peer,
        )
        if hasattr(module, "serve"):
            if self.signal:
                raise asyncio.CancelledError
            self._task = self.daemon.loop.create_task(module.serve(call))
            status: int = await self._task
            return status

        def work(host: Host, names: Registry) -> int:
            call.host, call.names = host, names
            status: int = module.run(call)
            return status

        code: int = await thread_for(self.daemon, module)(work)
        return code


def thread_for(daemon: Daemon, module: Any) -> Callable[[Any], Coroutine[Any, Any, Any]]:
    """Where a verb that is no coroutine runs: those that wait for guests starve only their like."""
    waits = getattr(module, "WAITS", False)
    return daemon.in_wait_thread if waits else daemon.in_verb_thread


def _write(fd: int, text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(fd, text.encode(errors="backslashreplace"))
