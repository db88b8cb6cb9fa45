"""The guests that the daemon looks after, on a hypervisor of paper."""

from __future__ import annotations

import asyncio
import errno
import os
import uuid
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from paper_xen import Xen

from chaos import afterlife, registry
from chaos.daemon import guests as module
from chaos.daemon.guests import EVENTS_FREE, Guest, Guests
from chaos.diskspec import DiskConfig, parse_disk
from chaos.domconfig import DomainConfig
from chaos.registry import RUNNING, Record, Registry
from chaos.vifspec import VifConfig
from noxs.abi import STATE_READY
from noxs.page import GUEST, GUEST_OFFSET
from xenctypes.errors import CallFailed, ImageError, StateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from chaos.restarts import Restart

A = "00000000-0000-4000-8000-00000000000a"
B = "00000000-0000-4000-8000-00000000000b"
SHELL = "00000000-0000-4000-8000-00000000000c"
PATIENCE = 10.0
CRASHING = DomainConfig(name="web", memory=4, on_crash="restart")
BUSY = CallFailed("xen", errno.EBUSY)


class Lab:
    """Guests, and as much of a daemon as they need."""

    def __init__(self, names: Registry) -> None:
        self.xen = Xen()
        self.host = self.xen.host
        self.names = names
        self.stopping = False
        self.consoles = None
        self.told: list[tuple[str, dict[str, Any], bool]] = []
        self.lines: list[str] = []
        self.on_the_bus: list[tuple[str, list[bytes]]] = []
        self.again: list[str] = []
        self.owners: list[dict[str, Any] | None] = []
        self.disks: tuple[DiskConfig, ...] = ()
        self.loop = asyncio.get_running_loop()
        self.news = asyncio.Event()
        self.tasks: list[asyncio.Task[Any]] = []
        self.pool = SimpleNamespace(uuids=set, directories=0)
        self.threads = 0
        daemon: Any = self
        self.guests = Guests(daemon)

    def emit(self, kind: str, **data: Any) -> None:
        there = "uuid" in data and self.xen.of(data["uuid"]) is not None
        self.told.append((kind, data, there))
        self.news.set()

    def log(self, line: str) -> None:
        self.lines.append(line)

    def spawn(self, work: Any) -> None:
        self.tasks.append(self.loop.create_task(work))

    async def in_thread(self, function: Callable[[Any, Registry], Any]) -> Any:
        self.threads += 1
        return function(self.host, Registry(self.names.path))

    def consoles_add(self, guest: Guest) -> None:
        """Nobody listens."""

    consoles_remove = write_ready = consoles_add

    def tell_the_bus(self, guest: Guest, macs: list[bytes]) -> None:
        self.on_the_bus.append((guest.uuid, macs))

    async def create_again(
        self, config: DomainConfig, uuid: bytes, owner: dict[str, Any] | None
    ) -> Guest:
        self.again.append(config.name)
        self.owners.append(owner)
        self.disks = config.disks
        assert self.xen.of(A) is None
        record = Record(A, config.name, RUNNING, self.xen.create(A))
        guest = Guest(record, config)
        self.guests.add(guest)
        return guest

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.told]

    def record(self, **state: bool) -> Record:
        """The record of a domain that runs."""
        uuid, name = A, "web"
        domid = self.xen.create(uuid, paused=False, **state)
        config = DomainConfig(name=name, memory=4, on_crash="restart", on_poweroff="rename-restart")
        record = Record(
            uuid, name, RUNNING, domid, noxs=True, store_frame=7, store_port=1,
            config=config.as_dict(),
        )  # fmt: skip
        self.names.reserve(record).close()
        return record

    def say_ready(self) -> None:
        GUEST.pack_into(self.xen.page, GUEST_OFFSET, 0, 0, STATE_READY, 0, 0, 0, 0, b"", b"")

    def adopted(self, record: Record) -> Guest:
        guest = self.guests.adopt(record)
        assert guest is not None
        return guest


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    def go(test: Callable[[Lab], Awaitable[None]]) -> None:
        async def main() -> None:
            async with asyncio.timeout(PATIENCE):
                await test(Lab(Registry(str(tmp_path / "run"))))

        asyncio.run(main())

    return go


def test_a_guest_that_chatters_is_heard_less_and_less(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        guest = lab.adopted(lab.record())
        heard = 0
        while lab.xen.event(guest.port):
            lab.guests._events()
            heard += 1
        assert heard == EVENTS_FREE + 1
        assert "ready" not in lab.kinds()
        waiter = lab.loop.create_future()
        guest.waiters = [waiter]
        lab.say_ready()
        while not waiter.done():  # later, but heard
            if lab.xen.event(guest.port):
                lab.guests._events()
            await next_timer(lab)
        (ready,) = (data for kind, data, _ in lab.told if kind == "ready")
        assert ready["uuid"] == A
        assert not lab.xen.event(guest.port)
        assert guest.port in lab.xen.masked  # it has said all that it can

    run(test)


async def next_timer(lab: Lab) -> None:
    """Wait for the guest's channel to be unmasked: a timer behind that of the module."""
    due = lab.loop.create_future()
    lab.loop.call_later(module.EVENT_PAUSE, due.set_result, None)
    await due


def test_beside_xenstored_the_dead_are_looked_for(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the interrupt, and passes on the deaths of domains that it knows alone."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    pipe = os.pipe()

    async def test(lab: Lab) -> None:
        def taken(_virq: int) -> int:
            raise CallFailed("xenevtchn_bind_virq", errno.EEXIST)

        lab.xen.bind_virq = taken  # type: ignore[attr-defined]
        lab.xen.watch = lambda *_: None  # type: ignore[attr-defined]
        lab.xen.fd = lab.xen.fileno = pipe[0]  # type: ignore[attr-defined]
        lab.host.bus = SimpleNamespace(watch=lambda *_: None, fileno=lambda: pipe[0])
        lab.guests.start()
        record = lab.record()
        lab.adopted(record)
        lab.xen.domains[record.domid].shutdown = True
        lab.xen.domains[record.domid].shutdown_reason = 3
        while "died" not in lab.kinds():
            await lab.news.wait()
            lab.news.clear()
        lab.guests.by_uuid.clear()
        await asyncio.gather(*lab.tasks, return_exceptions=True)

    run(test)


def test_a_shell_s_channel_stays_open(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        port = lab.xen.bind_interdomain(9, 1)
        assert lab.xen.event(port)
        lab.guests._events()
        assert lab.xen.event(port)

    run(test)


@pytest.mark.parametrize(
    ("reason", "failing"),
    [(3, "domain_destroy"), (0, "domain_sethandle")],
    ids=["restart", "rename"],
)
def test_a_restart_outlives_a_failure_of_the_end(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, reason: int, failing: str
) -> None:
    delays = iter([0.0, 0.0])

    async def test(lab: Lab) -> None:
        record = lab.record(shutdown=True)
        domain = lab.xen.domains[record.domid]
        domain.shutdown_reason = reason
        guest = lab.adopted(record)
        guest.born -= 2 * afterlife.YOUNG

        def delay(failures: int) -> float:
            if failures:
                assert lab.guests.lookup(A) in {None, guest}  # it is not adopted once more
                if next(delays, None) is None:
                    lab.xen.failing.clear()
            return 0.0

        monkeypatch.setattr(afterlife, "delay", delay)
        lab.xen.failing[failing] = BUSY
        lab.guests._look_now()
        lab.guests._look_now()  # it is dealt with once
        await lab.tasks[0]
        assert len(lab.tasks) == 1
        assert lab.kinds().count("problem") == 3
        assert lab.again == ["web"]
        assert lab.kinds().count("adopted") == (2 if reason == 0 else 1)
        assert lab.guests.restarts.all() == []
        if failing == "domain_destroy":
            (there,) = (there for kind, _, there in lab.told if kind == "destroyed")
            assert not there
        else:
            assert domain.uuid != lab.xen.domains[2].uuid
            lab.guests._look_now()
            assert len(lab.tasks) == 1  # the one that was set aside stays

    run(test)


def test_a_guest_that_is_destroyed_while_its_death_is_seen_to_is_not_restarted(
    run: Callable[..., None],
) -> None:
    async def test(lab: Lab) -> None:
        record = lab.record(shutdown=True)
        lab.xen.domains[record.domid].shutdown_reason = 3
        lab.adopted(record)
        write = lab.guests.restarts.write

        def late(restart: Restart) -> None:
            lab.xen.domains.clear()
            with lab.names.entry(A) as entry:
                lab.names.forget(entry, record)
            write(restart)

        lab.guests.restarts.write = late  # type: ignore[method-assign]
        lab.guests._look_now()
        await lab.tasks[0]
        assert lab.again == []
        assert lab.kinds()[-1] == "restart called off"

    run(test)


@pytest.mark.parametrize("maker", ["daemon", "command", "daemon, and it dies"])
@pytest.mark.parametrize(
    ("reason", "failing"),
    [(3, "domain_destroy"), (0, "domain_sethandle")],
    ids=["restart", "rename"],
)
def test_an_end_that_is_late_is_not_another_s(
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    reason: int,
    failing: str,
    maker: str,
) -> None:
    """Somebody ended the dead domain meanwhile, and made another of the same UUID."""

    async def test(lab: Lab) -> None:
        guests = lab.guests
        record = lab.record(shutdown=True, shutdown_reason=reason)
        lab.adopted(record).born -= 2 * afterlife.YOUNG

        def delay(failures: int) -> float:
            if failures:
                lab.xen.failing.clear()
                guests.restarts.call_off("web")
                guests.ended(A, record.domid)
                lab.xen.domain_destroy(record.domid)
                with lab.names.entry(A) as entry:
                    lab.names.forget(entry, record)
                lab.again.append(str(lab.record().domid))
                if maker != "command":
                    again = lab.names.read(A)
                    assert again is not None
                    guests.add(Guest(again, DomainConfig(name="web", memory=4)))
                if maker.endswith("dies"):
                    guests._ending.add(A)  # somebody sees to it
            return 0.0

        monkeypatch.setattr(afterlife, "delay", delay)
        lab.xen.failing[failing] = BUSY
        guests._look_now()
        await lab.tasks[0]
        assert lab.again == ["2"]
        assert list(lab.xen.domains) == [2]
        assert str(uuid.UUID(bytes=lab.xen.domains[2].uuid)) == lab.names.uuid_of("web") == A
        assert lab.kinds()[-1] == "restart called off"
        guests._seen_mtime = os.stat(f"{lab.names.path}/domains").st_mtime_ns
        await guests.notice_others()
        assert guests.by_uuid[A].domid == 2
        lab.xen.domains[2].shutdown = True
        news = [guest.domid for guest, _ in guests._news()]  # its death is its own
        assert news == ([] if maker.endswith("dies") else [2])

    run(test)


def test_only_the_domain_of_that_number_is_destroyed(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        record = lab.record()
        module._destroy(lab.host, lab.names, A, record.domid + 1)
        assert lab.names.read(A) == record
        module._destroy(lab.host, lab.names, A, record.domid)
        assert lab.xen.domains == {}
        assert lab.names.uuids() == []

    run(test)


@pytest.mark.parametrize(
    ("failure", "tries"),
    [
        (OSError(errno.ENOSPC, "no room"), module.RESTART_TRIES),
        (StateError("no room"), 1),
    ],
    ids=["passing", "lasting"],
)
def test_whoever_waits_for_a_restart_hears_that_there_is_none(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, failure: Exception, tries: int
) -> None:
    monkeypatch.setattr(afterlife, "delay", lambda _: 0.0)

    async def test(lab: Lab) -> None:
        record = lab.record(shutdown=True, shutdown_reason=3)
        lab.adopted(record).born -= 2 * afterlife.YOUNG
        failures = 0

        async def fail(*_: object) -> Guest:
            nonlocal failures
            failures += 1
            raise failure

        lab.create_again = fail  # type: ignore[method-assign]
        lab.guests._look_now()
        await lab.tasks[0]
        kind, data, _ = lab.told[-1]
        assert (kind, data["uuid"]) == ("restart failed", A)
        assert "no room" in data["what"]
        assert failures == tries
        assert lab.guests.restarts.all() == []
        # Destroyed before anything was planned.
        record = lab.record(shutdown=True, shutdown_reason=3)
        lab.adopted(record)
        lab.guests._look_now()
        with lab.names.entry(A) as entry:
            lab.names.forget(entry, record)
        await lab.tasks[1]
        assert lab.told[-1][:2] == ("restart called off", {"name": "web", "uuid": A})

    run(test)


@pytest.mark.parametrize("called_off", [False, True])
def test_a_restart_is_tried_again_unless_it_is_called_off(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, called_off: bool
) -> None:
    """Its maker was killed, or memory was short for a moment: the guest is not lost for that."""

    async def test(lab: Lab) -> None:
        create = lab.create_again
        failures = [ImageError("its maker was killed"), OSError(errno.ENOSPC, "no room")]

        async def fail(*args: Any) -> Guest:
            if failures:
                raise failures.pop()
            return await create(*args)

        def delay(tries: int) -> float:
            if tries and called_off:
                lab.guests.restarts.drop(A)
            return 0.0

        monkeypatch.setattr(lab, "create_again", fail)
        monkeypatch.setattr(afterlife, "delay", delay)
        lab.adopted(lab.record(shutdown=True, shutdown_reason=3)).born -= 2 * afterlife.YOUNG
        lab.guests._look_now()
        await lab.tasks[0]
        assert lab.again == ([] if called_off else ["web"])
        assert lab.kinds().count("problem") == (1 if called_off else 2)
        assert (lab.kinds()[-1] == "restart called off") == called_off
        assert lab.guests.restarts.all() == []

    run(test)


def test_a_restart_has_the_rights_and_the_devices_of_the_dead_one(
    run: Callable[..., None],
) -> None:
    """The rights of who had it made, and the disks that it had at its very end."""
    owner = {"uid": 1000, "gid": 1001, "groups": [7]}

    async def test(lab: Lab) -> None:
        record = lab.record(shutdown=True, shutdown_reason=3)
        record.owner = owner
        disk = parse_disk("/srv/d,raw,xvda,rw")[0]
        record.config["disk"] = replace(CRASHING, disks=(disk,)).as_dict()["disk"]
        with lab.names.entry(A) as entry:
            entry.write(record)
        lab.adopted(record).born -= 2 * afterlife.YOUNG
        write = lab.guests.restarts.write

        def late(restart: Restart) -> None:
            write(restart)
            if restart.config.disks:  # somebody detaches it now
                record.config["disk"] = []
                with lab.names.entry(A) as entry:
                    entry.write(record)

        lab.guests.restarts.write = late  # type: ignore[method-assign]
        lab.guests._look_now()
        await lab.tasks[0]
        assert lab.again == ["web"]
        assert lab.owners == [owner]
        assert lab.disks == ()

    run(test)


def test_the_bus_is_told_of_those_that_a_killed_daemon_left(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        record = lab.record()
        record.macs = ["00:16:3e:00:00:01"]
        vifs = (VifConfig(),)
        record.config = DomainConfig(name="web", memory=4, vifs=vifs).as_dict()
        with lab.names.entry(A) as entry:
            entry.write(record)
        await lab.guests.adopt_all()
        assert lab.on_the_bus == [(A, [bytes.fromhex("00163e000001")])]

    run(test)


def test_destroyed_is_told_when_it_is(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        guest = lab.adopted(lab.record())
        assert lab.told[-1][:2] == ("adopted", {"name": "web", "domid": 1, "uuid": A})
        lab.xen.failing["domain_destroy"] = BUSY
        with pytest.raises(CallFailed):
            await lab.guests.end(A)
        assert "destroyed" not in lab.kinds()
        lab.xen.failing.clear()
        lab.guests.add(guest)
        await lab.guests.end(A)
        assert lab.told[-1] == ("destroyed", {"name": "web", "domid": 1, "uuid": A}, False)
        assert lab.xen.mapped == []

    run(test)


def test_what_a_verb_destroyed_is_let_go_of_at_once_and_told_once(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        lab.adopted(lab.record())
        lab.xen.domains.clear()
        lab.guests.ended(A, 7)  # the UUID was another domain's then
        assert lab.xen.mapped != []
        lab.guests.ended(A, 1)
        assert lab.xen.mapped == []
        lab.guests.ended(A, 1)
        lab.guests._look_now()
        assert lab.kinds().count("destroyed") == 1
        assert lab.tasks == []

    run(test)


def test_the_last_words_of_a_guest_outlive_it(run: Callable[..., None]) -> None:
    """Whoever waits for its end may come to read them when it is gone already."""

    async def test(lab: Lab) -> None:
        record = lab.record(shutdown=True, shutdown_reason=3)
        guest = lab.adopted(record)
        GUEST.pack_into(lab.xen.page, GUEST_OFFSET, 0, 0, STATE_READY, 7, 0, 3, 0, b"", b"bye")
        await lab.guests.end(guest.uuid)
        lab.xen.page[:] = bytes(len(lab.xen.page))  # another's by now
        words = guest.words()
        assert words is not None
        assert (words.exit_code, words.message) == (7, "bye")
        assert lab.xen.mapped == []

    run(test)


def test_a_channel_that_another_command_has_is_asked_for_again(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(module, "RETRY_MAX", 0.001)

    async def test(lab: Lab) -> None:
        lab.xen.failing["bind_interdomain"] = BUSY
        guest = lab.adopted(lab.record())
        assert lab.xen.mapped == []
        waiter = lab.loop.create_future()
        guest.waiters = [waiter]
        lab.say_ready()
        lab.loop.call_later(0.005, lab.xen.failing.clear)
        assert await waiter == "ready"
        assert lab.guests.by_port == {guest.port: guest}
        assert lab.xen.calls["bind_interdomain"] > 2

    run(test)


def test_what_other_commands_make_is_noticed_and_nothing_costs_nothing(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    class Watched(Registry):
        def read(self, uuid: str) -> Record | None:
            read.append(uuid)
            return super().read(uuid)

    async def test(lab: Lab) -> None:
        guests, directory = lab.guests, f"{lab.names.path}/domains"
        old = lab.record()
        lab.adopted(old)
        lab.pool.uuids, lab.pool.directories = lambda: {SHELL}, 1
        lab.names.add_shell(Record(SHELL, "", state=registry.SHELL)).close()
        # Another command makes a domain, and is seen at it.
        record = Record(B, "other", registry.BUILDING, lab.xen.create(B, paused=False))
        entry = lab.names.reserve(record)
        monkeypatch.setattr("test_daemon_guests.Registry", Watched)
        await guests.notice_others()
        assert read == [B]
        assert B not in guests.by_uuid
        os.utime(directory, ns=(1, 1))  # the clock's tick is over
        await guests.notice_others()
        record.state, record.config = RUNNING, old.config
        entry.write(record)
        entry.close()
        assert os.stat(directory).st_mtime_ns == 1
        await guests.notice_others()
        assert guests.by_uuid[B].name == "other"
        # From now on nothing happens.
        threads = lab.threads
        read.clear()
        for _ in range(5):
            await guests.notice_others()
        assert (lab.threads, read) == (threads, [])

    run(test)


def test_our_own_domains_have_nobody_look_through_all_of_them(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        guests, directory = lab.guests, f"{lab.names.path}/domains"
        old = lab.record()
        lab.adopted(old)
        if os.stat(directory).st_nlink != module.LINKS + 1:
            pytest.skip("this file system does not count directories")
        await guests.notice_others()
        listed = lab.threads
        for number in range(3):  # the pool makes shells
            lab.names.add_shell(Record(f"{SHELL[:-1]}{number}", "", state=registry.SHELL)).close()
            lab.pool.directories += 1
            os.utime(directory, ns=(1, 1 + number))
            await guests.notice_others()
        assert lab.threads == listed
        # One is gone and another command's has come: as many as before, but not for ever.
        record = Record(B, "other", RUNNING, lab.xen.create(B, paused=False), config=old.config)
        lab.names.reserve(record).close()
        os.rename(f"{directory}/{SHELL[:-1]}0", f"{lab.names.path}/elsewhere")
        os.utime(directory, ns=(1, 9))
        await guests.notice_others()
        assert B not in guests.by_uuid
        guests._list_by = 0.0
        await guests.notice_others()
        assert B in guests.by_uuid

    run(test)


def test_looks_for_deaths_take_no_more_than_their_share(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(lab: Lab) -> None:
        guests = lab.guests

        def soon() -> float:
            guests.look_soon()
            assert guests._look is not None
            left = guests._look.when() - lab.loop.time()
            guests._look.cancel()
            return left

        assert soon() <= module.COALESCE
        clock = [100.0]

        def slow() -> list[Any]:
            clock[0] += 2.0
            return []

        monkeypatch.setattr(module, "monotonic", lambda: clock[0])
        monkeypatch.setattr(guests, "_news", slow)
        guests._look_now()
        assert 7.0 < soon() <= 8.0
        monkeypatch.setattr(guests, "_news", list)
        guests._look_now()
        assert soon() <= module.COALESCE

    run(test)


def test_what_cannot_be_adopted_is_said_once(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        record = lab.record()
        record.config = {"memory": "much"}
        with lab.names.entry(A) as entry:
            entry.write(record)
        await lab.guests.adopt_all()
        assert lab.guests.lookup(A) is None
        assert len(lab.lines) == 1
        assert lab.lines[0].startswith("web is not looked after: ")

    run(test)


def test_who_died_is_looked_for_again_after_a_failure(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.0)

    async def test(lab: Lab) -> None:
        lab.adopted(lab.record())
        lab.xen.domains.clear()
        lab.xen.failing["domain_states"] = BUSY
        lab.guests._look_now()
        assert A in lab.guests.by_uuid
        lab.xen.failing.clear()
        waiter = lab.loop.create_future()
        lab.guests.by_uuid[A].waiters = [waiter]
        assert await waiter == "dead"

    run(test)
