"""create, served by the daemon: from its pool, several at once, all or nothing."""

from __future__ import annotations

import asyncio
import contextlib
from argparse import Namespace
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from chaos.afterlife import action_for
from chaos.cli import describe_error
from chaos.daemon.bar import bar
from chaos.verbs.create import members, report, sources
from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chaos.daemon.core import Daemon
    from chaos.daemon.guests import Guests
    from chaos.daemon.shell import Delivery
    from chaos.daemon.wanted import Wanted
    from chaos.invocation import Invocation

AT_ONCE = 64
"""Domains that are told of before what is printed must be read."""


async def serve(call: Invocation) -> int:
    """Create what the command line asks for."""
    args, daemon = call.args, call.daemon
    wanted = await _wanted(call)
    if args.dryrun:
        await _print_json(call, lambda: [one.config.as_dict() for one in wanted])
        return 0
    batch = Batch(call)
    try:
        await batch.create(wanted)
        if args.console:
            return await _console(call, batch.made[0])
        if args.foreground:
            return await _stay(call, batch.made[0])
        if args.profile or args.json:
            await batch.wait_ready(args.ready_timeout)
    except BaseException:
        await asyncio.shield(batch.take_back())
        raise
    if args.json:
        described = [daemon.describe(delivery) for delivery in batch.made]
        await _print_json(call, lambda: described)
        return batch.status
    for start in range(0, len(batch.made), AT_ONCE):
        report(call, [daemon.describe(each) for each in batch.made[start : start + AT_ONCE]])
        await call.drain()
    return batch.status


async def _wanted(call: Invocation) -> list[Wanted]:
    """The configurations to create, checked; warnings are printed."""
    args = call.args
    path, overrides = sources(args)
    wanted: list[Wanted] = []
    for member in members(args, overrides):
        if not wanted or member.overrides != overrides:
            base = await call.daemon.read(call.peer, call.directory, path, member.overrides)
            await asyncio.sleep(0)  # others have their turn
        if not (args.quiet or wanted):
            for warning in base.warnings:
                call.warn(warning)
        name = member.name(base.config.name)
        wanted.append(base if name == base.config.name else base.named(name))
    return wanted


async def _print_json(call: Invocation, values: Callable[[], list[Any]]) -> None:
    """Print JSON of each domain, the one or a list; many take their time, in a thread."""

    def write(*_: object) -> None:
        shown = values()
        call.print_json(shown if call.args.count else shown[0])

    if call.args.count:
        await call.daemon.in_verb_thread(write)
    else:
        write()


class Batch:
    """Several creates of one command."""

    def __init__(self, call: Invocation) -> None:
        self.call = call
        self.daemon: Daemon = call.daemon
        self.made: list[Delivery] = []
        self.status = 0

    async def create(self, wanted: Sequence[Wanted]) -> None:
        """Create them, as many at a time as there are makers. The first failure is raised."""
        left = iter(wanted)
        async with bar(self.call, "creating", len(wanted)) as advance:
            workers = min(len(wanted), self.daemon.settings.builders)
            tasks = [
                self.daemon.loop.create_task(self._work(left, advance)) for _ in range(workers)
            ]
            try:
                await asyncio.gather(*tasks)
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                raise
        order = {one.config.name: index for index, one in enumerate(wanted)}
        self.made.sort(key=lambda delivery: order[delivery.config.name])

    async def _work(self, left: Any, advance: Callable[[], None]) -> None:
        args, peer = self.call.args, self.call.peer
        paused = args.paused or args.console
        for one in left:
            try:
                delivery = self.daemon.create_now(one, peer, paused=paused)
                if delivery is None:
                    delivery = await self.daemon.create(one, peer, paused=paused)
                self.made.append(delivery)
            except ChaosError as error:
                if not args.keep_going:
                    raise
                self.status = 1
                self.call.stderr.write(describe_error(error, verbose=args.verbose))
            advance()
            await asyncio.sleep(0)  # others have their turn

    async def wait_ready(self, seconds: float) -> None:
        """Wait until each is ready, or was given the time."""
        await asyncio.gather(
            *(
                self.daemon.wait(delivery.shell.uuid, seconds)
                for delivery in self.made
                if delivery.shell.noxs and not delivery.paused
            )
        )

    async def take_back(self) -> None:
        """Destroy what was made, and what would come in its place."""
        guests = self.daemon.guests
        for delivery in reversed(self.made):
            uuid = delivery.shell.uuid
            guests.restarts.drop(uuid)
            with contextlib.suppress(ChaosError):
                await guests.end(uuid)
            guests.restarts.drop(uuid)  # its death may have been noticed meanwhile


async def _console(call: Invocation, delivery: Delivery) -> int:
    """Attach to the console, then let the guest run; its whole output is in the history."""
    from chaos.verbs.console import serve as attach

    if not call.args.paused:
        call.daemon.loop.call_soon(call.daemon.unpause, delivery)
    await attach(replace(call, args=Namespace(domain=delivery.shell.uuid)))
    return 0


async def _stay(call: Invocation, delivery: Delivery) -> int:
    """Wait for the domain's end, through its restarts. Being cancelled destroys it."""
    uuid = delivery.shell.uuid
    async with contextlib.aclosing(call.daemon.events.subscribe(None)) as events:
        watch = Watch(call, delivery)
        status = watch.look()
        while status is None:
            event = await anext(events, None)
            if event is None:
                return 0
            if event["event"] == "gap":
                status = watch.look()
            elif event.get("uuid") == uuid:
                status = watch.hear(event)
                await call.drain()
    return status


class Watch:
    """What ``create -F`` knows of its domain.

    ``ending`` is what becomes of the dead one, "" while it lives; ``domid`` changes with a restart.
    """

    def __init__(self, call: Invocation, delivery: Delivery) -> None:
        self.call = call
        self.guests: Guests = call.daemon.guests
        self.uuid, self.name = delivery.shell.uuid, delivery.config.name
        self.domid = delivery.shell.domid
        self.ending = ""

    def hear(self, event: dict[str, Any]) -> int | None:
        """Take an event of the domain; the status to end with, None to go on."""
        kind = event["event"]
        if kind == "died":
            self.domid, self.ending = event["domid"], event["action"]
            self._say(f"{event['reason']}, {self.ending}")
            return 0 if self.ending == "preserve" else None
        if kind == "created":
            gone = self.ending == "destroy"  # and this is another command's
            self.domid, self.ending = event["domid"], ""
            return 0 if gone else None
        if kind == "destroyed":
            if event["domid"] != self.domid or self.ending not in {"", "destroy"}:
                return None
            if not self.ending:
                self._say("destroyed by another command")
            return 0
        if kind == "restart called off":
            self._say("destroyed by another command")
            return 0
        if kind == "restart failed":
            self.call.stderr.write(f"chaos: {self.name} is not restarted: {event['what']}\n")
            return 1
        return None

    def look(self) -> int | None:
        """The same where events are missing, by what has become of the domain meanwhile."""
        guest = self.guests.by_uuid.get(self.uuid)
        if guest is None:
            self.ending = "restart"
            return None if self.guests.restarts.holds(self.uuid) else 0
        self.domid = guest.domid
        self.ending = action_for(guest.config, guest.death)[0] if guest.death else ""
        return 0 if self.ending == "preserve" else None

    def _say(self, what: str) -> None:
        if not self.call.args.quiet:
            self.call.print(f"{self.name}, domain {self.domid}: {what}")
