"""What clients may ask: the methods of docs/protocol.md, and ``run``, which runs a whole command.

A method is ``async def _name(connection, ident, params)``; its value is the reply's.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from chaos import __version__, frames
from chaos.cli import VERBS
from chaos.daemon import settings as settings_module
from chaos.daemon.command import (
    LOGGED,
    Command,
    log_caller,
    parser_of,
    thread_for,
    wants_client,
)
from chaos.daemon.rights import check_flavour
from chaos.daemon.wanted import LONG, NotHere, TooLong, want
from chaos.invocation import Invocation, unreported
from chaos.readiness import never_ready
from xenctypes.errors import ConfigError, ProtocolError, UsageError

if TYPE_CHECKING:
    from chaos.daemon.core import Daemon
    from chaos.daemon.server import Connection
    from chaos.daemon.shell import Delivery
    from chaos.daemon.wanted import Wanted
    from chaos.invocation import Report

Method = Callable[[Any, int, dict[str, Any]], Coroutine[Any, Any, Any]]

REPORT = " report"
"""Where a method finds its Report among the parameters, whatever a client said there."""
NEITHER = "create needs a path or a config"
WAIT_MAX = 10**6
TEXTS_MAX = 4096
SIMPLE = {
    "destroy": ("domains", "force", "all"),
    "list": ("domains",),
    "info": (),
    "shutdown": ("domains", "all", "wait", "timeout"),
    "reboot": ("domains", "all", "wait", "timeout"),
}
"""Methods that are verbs with --json, and the parameters that they take."""
REPORTING = frozenset(
    ["create", "destroy", "shutdown", "reboot", "pool.drain", "pool.remove", "pool.wait"]
)
"""Methods that report progress to whoever wants it."""
WAIT_SECONDS = 3600.0
"""How long ``wait`` of shutdown and reboot waits where no timeout is given."""


class Calls:
    """Dispatches requests."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self._methods: dict[str, Method] = {
            "wait": self._wait,
            "pause": self._pause,
            "unpause": self._pause,
            "rename": self._rename,
            "events": self._events,
            "usage": self._usage,
            "version": self._version,
            "logs": self._logs,
            "console.attach": self._console,
            "pool.list": self._pool_list,
            "pool.add": self._pool_add,
            "pool.resize": self._pool_resize,
            "pool.drain": self._pool_drain,
            "pool.remove": self._pool_remove,
            "pool.wait": self._pool_wait,
        }

    def dispatch(
        self, connection: Connection, request: frames.Request
    ) -> Coroutine[Any, Any, Any] | None:
        """Begin with a request: what is left to do, or None if it is answered."""
        ident, method, params = request
        if method in LOGGED:
            log_caller(connection, method, params)
        if method == "run":
            return self._run(connection, ident, params)
        if method == "signal":
            cancel = connection.cancels.get(_take(params, "id", int))
            if cancel is not None:
                cancel(_take(params, "signal", int))
            return None
        if method == "cancel":
            connection.cancel(_take(params, "id", int))
            return _done()
        if method == "console.write":
            return self._console_write(connection, params)
        progress = None
        if method in REPORTING and "progress" in params:
            if _take(params, "progress", bool):
                progress = Progress(connection, ident)
            params = {key: value for key, value in params.items() if key != "progress"}
        work = self._begin(connection, ident, method, params, progress or unreported)
        return work if progress is None or work is None else progress.during(work)

    def _begin(
        self,
        connection: Connection,
        ident: int,
        method: str,
        params: dict[str, Any],
        report: Report,
    ) -> Coroutine[Any, Any, Any] | None:
        if method == "create":
            return self._begin_create(connection, ident, params, report)
        if method in SIMPLE:
            return self._verb(method, params, report)
        handler = self._methods.get(method)
        if handler is None:
            raise ProtocolError(f'no method "{method[:32]}"', hint="docs/protocol.md lists them")
        return handler(connection, ident, {**params, "": method, REPORT: report})

    # A whole command

    def _run(
        self, connection: Connection, ident: int, params: dict[str, Any]
    ) -> Coroutine[Any, Any, Any] | None:
        fds = connection.take_fds(4)
        command = None
        try:
            argv = [os.fsdecode(word) for word in _list(params, "argv", bytes)]
            if wants_client(argv):
                connection.reply(ident, frames.EXEC, None)
                return None
            directory = os.fsdecode(_take(params, "cwd", bytes))
            env = _take(params, "env", dict)
            command = Command(self.daemon, connection, ident, argv, directory, env, fds)
            fds = []
            return command.begin()
        except NotHere:
            connection.reply(ident, frames.EXEC, None)
            return None
        finally:
            for fd in fds:
                os.close(fd)

    # Verbs whose output is the value

    async def _verb(self, method: str, params: dict[str, Any], report: Report) -> Any:
        known = SIMPLE[method]
        options = ["--json"]
        for key, value in params.items():
            if key not in known:
                raise ProtocolError(f'{method} has no parameter "{key[:32]}"')
            if key == "timeout":
                options.append(f"--timeout={_number(params, key)}")
            elif key != "domains" and value is True:
                options.append(f"--{key}")
        if params.get("wait") is True and "timeout" not in params:
            options.append(f"--timeout={WAIT_SECONDS}")
        names = _list(params, "domains", str)
        # Behind "--" a name is a name, whatever it looks like.
        argv = [*options, *(["--"] if names else []), *names]
        return await self._captured(method, argv, report)

    async def _captured(self, verb: str, argv: list[str], report: Report = unreported) -> Any:
        module = _module(verb)
        args = parser_of(verb).parse_args(argv)
        out = io.StringIO()
        cancel = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        unwanted = False

        def tell(*what: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.daemon.loop.call_soon_threadsafe(report, *what)

        def work(host: Any, names: Any) -> None:
            if unwanted:
                return
            unread = io.StringIO()
            call = Invocation(
                args, host, names, "/", unread, out, unread, {}, cancel, daemon=self.daemon,
                report=unreported if report is unreported else tell,
            )  # fmt: skip
            try:
                module.run(call)
            except KeyboardInterrupt:
                raise ProtocolError("cancelled") from None

        def ended(running: asyncio.Future[None]) -> None:
            os.close(cancel)
            if not running.cancelled():
                running.exception()  # nobody may want it any more

        running = asyncio.ensure_future(thread_for(self.daemon, module)(work))
        running.add_done_callback(ended)
        try:
            await asyncio.shield(running)
        finally:
            if not running.done():
                unwanted = True
                os.eventfd_write(cancel, 1)
        text = out.getvalue()
        return json.loads(text) if text else None

    # Methods

    async def _version(self, *_: Any) -> dict[str, Any]:
        return {"version": __version__, "protocol": frames.VERSION, "pid": os.getpid()}

    async def _usage(self, *_: Any) -> dict[str, Any]:
        from chaos.usage import look

        def work(host: Any, names: Any) -> dict[str, Any]:
            seen = look(host, names)
            return {"at": seen.at, "domains": [one._asdict() for one in seen.usages]}

        return await self.daemon.in_verb_thread(work)

    def _begin_create(
        self, connection: Connection, ident: int, params: dict[str, Any], report: Report
    ) -> Coroutine[Any, Any, Any] | None:
        """A create from a warm shell is answered at once: a task costs as much as half of it."""
        paused = _take(params, "paused", bool, default=False)
        seconds = 0.0 if paused else _number(params, "wait_ready")
        wanted = delivery = None
        if "config" not in params:
            with contextlib.suppress(TooLong, NotHere):
                wanted = self.daemon.reader.read(connection.peer, *_named(params))
                delivery = self.daemon.create_now(wanted, connection.peer, paused=paused)
        if delivery is None:
            return self._create(connection, params, wanted, seconds, report, paused=paused)
        if seconds and delivery.shell.noxs:
            return self._when_ready(delivery, seconds)
        connection.reply(ident, frames.OK, self._described(delivery))
        return None

    async def _create(
        self,
        connection: Connection,
        params: dict[str, Any],
        wanted: Wanted | None,
        seconds: float,
        report: Report,
        *,
        paused: bool,
    ) -> Any:
        wanted = wanted or await self._wanted(connection, params)
        told = None if report is unreported else report
        delivery = await self.daemon.create(wanted, connection.peer, paused=paused, report=told)
        if seconds and delivery.shell.noxs:
            return await self._when_ready(delivery, seconds)
        return self._described(delivery)

    async def _when_ready(self, delivery: Delivery, seconds: float) -> Any:
        await self.daemon.wait(delivery.shell.uuid, seconds)
        return self._described(delivery)

    def _described(self, delivery: Delivery) -> dict[str, Any]:
        described = self.daemon.describe(delivery)
        described["ready_ms"] = described["profile"]["ready_ms"]
        return described

    async def _wanted(self, connection: Connection, params: dict[str, Any]) -> Wanted:
        text = params.get("config")
        if text is None:
            directory, name, overrides = _named(params)
            try:
                return await self.daemon.read(connection.peer, directory, name, overrides)
            except NotHere:
                raise ConfigError("the configuration is no regular file", filename=name) from None
        if "path" in params:
            raise ProtocolError(NEITHER)
        overrides = _list(params, "overrides", str)
        from chaos import config, xlcfg
        from chaos.daemon.rights import borrowed

        if not isinstance(text, (bytes, str)):
            raise ProtocolError("the config is a text")
        directory = os.fsdecode(params.get("directory", "/"))

        def parse(*_: object) -> Wanted:
            document = xlcfg.parse(text, "config", overrides)
            parsed, warnings = config.from_document(document, directory=directory)
            if parsed.metadata_file:
                with borrowed(connection.peer):
                    parsed = config.with_metadata(parsed, regular=True)
            return want(parsed, warnings)

        if len(text) + sum(map(len, overrides)) > LONG:
            return await self.daemon.in_verb_thread(parse)
        return parse()

    async def _wait(self, _connection: Connection, _ident: int, params: dict[str, Any]) -> Any:
        guest = await self.daemon.find(_take(params, "domain", str))
        dead = _take(params, "dead", bool, default=False)
        timeout = _number(params, "timeout") if "timeout" in params else None
        if not dead and not guest.noxs:
            raise never_ready(guest.name)
        outcome = await self.daemon.wait(guest.uuid, timeout, dead=dead)
        words = guest.words()
        return {
            "name": guest.name,
            "domid": guest.domid,
            "outcome": outcome,
            "exit_code": words.exit_code if words else None,
            "ready_ms": guest.ready_ms,
        }

    async def _pause(self, _connection: Connection, _ident: int, params: dict[str, Any]) -> Any:
        guest = await self.daemon.find(_take(params, "domain", str))
        await self._captured(params[""], ["--", guest.uuid])
        return {"name": guest.name, "domid": guest.domid, "uuid": guest.uuid}

    async def _rename(self, _connection: Connection, _ident: int, params: dict[str, Any]) -> Any:
        guest = await self.daemon.find(_take(params, "domain", str))
        name = _take(params, "name", str)
        args = ["--", guest.uuid, name]
        await self._captured("rename", args)
        return {"name": name, "domid": guest.domid, "uuid": guest.uuid}

    async def _events(self, connection: Connection, ident: int, params: dict[str, Any]) -> None:
        token = _take(params, "token", str, default=None)
        async with contextlib.aclosing(self.daemon.events.subscribe(token)) as events:
            async for event in events:
                connection.reply(ident, frames.PROGRESS, event)
                await connection.room()

    async def _logs(self, _connection: Connection, _ident: int, params: dict[str, Any]) -> Any:
        from chaos.consolelog import ConsoleLog

        guest = await self.daemon.find(_take(params, "domain", str))
        path = f"{self.daemon.names.path}/domains/{guest.uuid}"
        return await self.daemon.in_thread(lambda _host, _names: ConsoleLog(path).read())

    async def _console(self, connection: Connection, ident: int, params: dict[str, Any]) -> Any:
        guest = await self.daemon.find(_take(params, "domain", str))
        assert self.daemon.consoles is not None
        attachment = self.daemon.consoles.attach(guest.uuid)
        connection.attached[ident] = attachment
        try:
            connection.reply(ident, frames.PROGRESS, attachment.history)
            async for data in attachment:
                connection.reply(ident, frames.PROGRESS, data)
                await connection.room()
        finally:
            connection.attached.pop(ident, None)
            attachment.close()
        return attachment.ending

    async def _console_write(self, connection: Connection, params: dict[str, Any]) -> Any:
        attachment = connection.attached.get(_take(params, "id", int))
        if attachment is None:
            raise ProtocolError("that request has no console attached")
        await attachment.send(_take(params, "data", bytes))

    # The pool

    async def _pool_list(self, *_: Any) -> list[dict[str, Any]]:
        return [flavour.describe() for flavour in self.daemon.pool.flavours.values()]

    async def _pool_add(self, connection: Connection, _ident: int, params: dict[str, Any]) -> Any:
        table = _take(params, "flavour", dict)
        check_flavour(connection.peer, table)
        return self.daemon.pool.add(settings_module.flavour(table)).describe()

    async def _pool_resize(
        self, _connection: Connection, _ident: int, params: dict[str, Any]
    ) -> Any:
        size = int(_number(params, "size"))
        low = int(_number(params, "low")) if "low" in params else None
        if not 0 <= size <= self.daemon.settings.max_shells:
            raise UsageError(f"the size is within 0 to {self.daemon.settings.max_shells}")
        return self.daemon.pool.resize(_take(params, "name", str), size, low).describe()

    async def _pool_drain(
        self, _connection: Connection, _ident: int, params: dict[str, Any]
    ) -> Any:
        name = _take(params, "name", str)
        return {"shells": await self.daemon.pool.drain(name, params[REPORT])}

    async def _pool_remove(
        self, _connection: Connection, _ident: int, params: dict[str, Any]
    ) -> None:
        await self.daemon.pool.remove(_take(params, "name", str), params[REPORT])

    async def _pool_wait(
        self, _connection: Connection, _ident: int, params: dict[str, Any]
    ) -> list[dict[str, Any]]:
        pool = self.daemon.pool
        names = _list(params, "names", str) or list(pool.flavours)
        await pool.filled(names, params[REPORT])
        return [pool.flavour(name).describe() for name in names]


class Progress:
    """A Report for one request: PROGRESS frames, for as long as its last reply is not out."""

    def __init__(self, connection: Connection, ident: int) -> None:
        self._connection = connection
        self._ident = ident
        self._over = False

    def __call__(self, what: str, done: int, total: int) -> None:
        """Tell the client."""
        if not self._over:
            value = {"what": what, "done": done, "total": total}
            self._connection.reply(self._ident, frames.PROGRESS, value)

    async def during(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do the work; nothing that it tells later is passed on."""
        try:
            return await work
        finally:
            self._over = True


def _named(params: dict[str, Any]) -> tuple[str, str, list[str]]:
    """A configuration's directory, its path, and the overrides. ProtocolError, UsageError."""
    path = params.get("path")
    if path is None:
        raise ProtocolError(NEITHER)
    name = os.fsdecode(path) if isinstance(path, (bytes, str)) else ""
    if not os.path.isabs(name):
        raise UsageError("the path of a configuration is absolute here")
    return os.path.dirname(name), name, _list(params, "overrides", str)


async def _done() -> None:
    """What has been done already."""


_NOTHING = object()


def _take(params: dict[str, Any], key: str, kind: type, *, default: Any = _NOTHING) -> Any:
    value = params.get(key, default)
    if value is _NOTHING:
        raise ProtocolError(f'the parameter "{key}" is missing')
    if value is not default and type(value) is not kind:
        raise ProtocolError(f'the parameter "{key}" is no {kind.__name__}')
    return value


def _list(params: dict[str, Any], key: str, kind: type) -> list[Any]:
    value = params.get(key, [])
    if not isinstance(value, list) or len(value) > TEXTS_MAX:
        raise ProtocolError(f'the parameter "{key}" is no list, or too long')
    if any(type(each) is not kind for each in value):
        raise ProtocolError(f'the parameter "{key}" has something else than {kind.__name__} in it')
    return value


def _number(params: dict[str, Any], key: str) -> float:
    value = params.get(key, 0)
    if type(value) not in (int, float) or not 0 <= value <= WAIT_MAX:
        raise ProtocolError(f'the parameter "{key}" is no number within 0 to {WAIT_MAX}')
    return float(value)


def _module(verb: str) -> Any:
    from importlib import import_module

    return import_module(f"chaos.verbs.{VERBS[verb].module}")
