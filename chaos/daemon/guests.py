"""The guests that the daemon looks after: what it holds of each, and what becomes of the dead.

::

    deliver/adopt --> running --ready event--> running, ready_ms known
                         |
                         +-- gone            another command destroyed it: forget
                         +-- shut down --on_poweroff, on_reboot, on_crash-->
                                 destroy, preserve, restart, rename-restart
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import uuid as uuid_module
from time import monotonic, perf_counter_ns, time_ns
from typing import TYPE_CHECKING, TypeVar

from chaos import afterlife
from chaos.configjson import from_dict
from chaos.destroy import destroy
from chaos.domains import find as find_domain
from chaos.domains import reap_one, shutdown_name, unfinished
from chaos.registry import BUILDING, RUNNING
from chaos.restarts import Restart, Restarts
from noxs.abi import STATE_READY
from noxs.page import read_guest_words
from xenctypes.errors import (
    CallFailed,
    ChaosError,
    ConfigError,
    PermissionDenied,
    StateError,
    UsageError,
)
from xenctypes.evtchn import VIRQ_DOM_EXC
from xenctypes.public import XEN_DOMINF_dying, XEN_DOMINF_shutdown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chaos.daemon.core import Daemon
    from chaos.domconfig import DomainConfig
    from chaos.host import Host
    from chaos.registry import Record, Registry
    from noxs.page import GuestWords
    from xenctypes.ctrl import DomainInfo
    from xenctypes.handle import Mapping

T = TypeVar("T")

COALESCE = 0.01
"""Seconds in which deaths are gathered, the least: each look costs a list of all domains."""
LOOK_SHARE = 0.2
"""Of a processor, for those looks: beside thousands of guests they are rarer."""
EVENTS_MAX = 64
"""Events taken at once."""
EVENTS_FREE = 8
"""Events of a guest that is not ready yet, after which the next one is heard later and later."""
EVENT_PAUSE, EVENT_PAUSE_MAX = 0.01, 1.0
LOOK_SECONDS = 0.5
"""Between looks for deaths that nothing tells of: a list of all domains each."""
LINKS = 2
"""Of an empty directory; each directory in it is one more, on tmpfs and most others."""
LIST_SECONDS = 30.0
"""How long the number of directories is believed, which may be right by chance."""
MTIME_GRAIN = 50_000_000
"""Nanoseconds within which two changes of a directory may leave it the same time."""
NOBODY = (0, b"")
"""Flags and UUID of a domain that is not there."""
RESTART_TRIES = 8
"""How often a restart is tried for which something failed that may pass: for two minutes."""
LASTING = (ConfigError, StateError, UsageError, PermissionDenied)
"""What another try would meet again."""
RETRY_SECONDS, RETRY_MAX = 1.0, 60.0
"""Seconds until a channel that another process has is asked for again, the first and last time."""


class Guest:
    """A running domain. ``mapping`` is its device page, ``port`` our end of its store channel.

    ``handle`` is its UUID as the hypervisor has it.
    ``born`` is when it began to run, monotonic: at ``since_ns``, or now. ``failures`` is how often
    in a row it died young, ``told`` whether its being ready was announced, ``events`` how many
    came before that.
    ``death`` is what the hypervisor said of it when it had shut down, None before.
    """

    __slots__ = (
        "born", "config", "console_frame", "console_port", "death", "domid", "events", "failures",
        "handle", "last_words", "mapping", "name", "noxs", "port", "ready_ms", "store_frame",
        "store_port", "told", "unpaused_ns", "uuid", "waiters",
    )  # fmt: skip

    def __init__(self, record: Record, config: DomainConfig, since_ns: int = 0) -> None:
        self.uuid = record.uuid
        self.handle = bytes.fromhex(record.uuid.replace("-", ""))
        self.name = record.name
        self.domid = record.domid
        self.noxs = record.noxs
        self.console_frame = record.console_frame
        self.console_port = record.console_port
        self.store_frame = record.store_frame
        self.store_port = record.store_port
        self.config = config
        self.mapping: Mapping | None = None
        self.last_words: GuestWords | None = None
        self.death: DomainInfo | None = None
        self.port = 0
        self.ready_ms = record.ready_ms
        self.unpaused_ns = 0
        self.born = since_ns / 1e9 or monotonic()
        self.failures = 0
        self.told = False
        self.events = 0
        self.waiters: list[asyncio.Future[str]] | None = None

    def words(self) -> GuestWords | None:
        """What the guest says of itself, or said last; None for one that has no device page."""
        if self.mapping is None:
            return self.last_words
        return read_guest_words(self.mapping.view)

    @property
    def ready(self) -> bool:
        """Whether the guest has said that it is ready."""
        words = self.words()
        return words is not None and words.state == STATE_READY

    def wake(self, outcome: str) -> None:
        """Tell those who wait for this guest."""
        waiters, self.waiters = self.waiters, None
        for waiter in waiters or ():
            if not waiter.done():
                waiter.set_result(outcome)

    def let_go(self, host: Host) -> None:
        """Unmap the page and close the channel. Idempotent."""
        if self.mapping is not None:
            self.last_words = self.words()
            self.mapping.close()
            self.mapping = None
        if self.port:
            host.evtchn.unbind(self.port)
            self.port = 0


class Guests:
    """All guests, by UUID, and by the port of their store channel."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.host = daemon.host
        self.names = daemon.names
        self.restarts = Restarts(daemon.names)
        self.by_uuid: dict[str, Guest] = {}
        self.by_port: dict[int, Guest] = {}
        self.virq = 0
        self._look: asyncio.TimerHandle | None = None
        self._gathering = COALESCE
        self._loop = asyncio.get_running_loop()
        self._ending: set[str] = set()
        self._refused: set[str] = set()
        self._seen_mtime = 0
        self._list_by = 0.0
        self._unsettled: set[str] = set()

    def start(self) -> None:
        """Hear of deaths and of ready events."""
        evtchn = self.host.evtchn
        try:
            self.virq = evtchn.bind_virq(VIRQ_DOM_EXC)
        except CallFailed as error:
            if error.errno != errno.EEXIST:
                raise
            self._watch_the_store()  # xenstored has the interrupt, and passes some of it on
        self._loop.add_reader(evtchn.fd, self._events)

    def _watch_the_store(self) -> None:
        bus = self.host.bus
        bus.watch("@releaseDomain", "chaosd")
        self._loop.add_reader(bus.fileno(), self._released)
        self._look_again()

    def _look_again(self) -> None:
        """Look now and then: xenstored passes on the deaths of those that it knows alone."""
        if self.by_uuid:
            self.look_soon()
        self._loop.call_later(LOOK_SECONDS, self._look_again)

    def _released(self) -> None:
        with contextlib.suppress(ChaosError):
            self.host.bus.events(0)
        self.look_soon()

    def _events(self) -> None:
        now = perf_counter_ns()
        for port in self.host.evtchn.take(EVENTS_MAX):
            guest = self.by_port.get(port)
            if guest is not None:
                self.heard(guest, now)
                self._hear_more(guest)
                continue
            if port == self.virq:
                self.look_soon()
            self._unmask(port)  # else of a shell, to which Xen sent the event of its binding

    def _hear_more(self, guest: Guest) -> None:
        """Unmask a guest's channel, later if it chatters; not if it has said all that it can."""
        if guest.told:
            return
        guest.events += 1
        late = guest.events - EVENTS_FREE
        if late > 0:
            pause = min(EVENT_PAUSE_MAX, late * EVENT_PAUSE)
            self._loop.call_later(pause, self._unmask_of, guest)
        else:
            self._unmask(guest.port)

    def _unmask_of(self, guest: Guest) -> None:
        if guest.port:
            self._unmask(guest.port)

    def _unmask(self, port: int) -> None:
        with contextlib.suppress(CallFailed):  # it was closed meanwhile
            self.host.evtchn.unmask(port)

    def heard(self, guest: Guest, now: int) -> None:
        """Take a guest's word that it is ready, if it has said so; ``now`` in ns."""
        if not guest.told and guest.ready:
            guest.told = True
            if guest.unpaused_ns:
                guest.ready_ms = (now - guest.unpaused_ns) / 1e6
            self.daemon.emit(
                "ready",
                name=guest.name,
                domid=guest.domid,
                uuid=guest.uuid,
                ready_ms=guest.ready_ms,
            )
            guest.wake("ready")
            self.daemon.write_ready(guest)

    def ring(self, uuid: str) -> bool:
        """Have a guest look at the request in its page. From any thread; False: no such guest."""
        guest = self.by_uuid.get(uuid)
        if guest is None or not guest.port:
            return False
        self._loop.call_soon_threadsafe(self._ring, guest)
        return True

    def _ring(self, guest: Guest) -> None:
        if guest.port:
            with contextlib.suppress(CallFailed):  # it died meanwhile
                self.host.evtchn.notify(guest.port)

    # Coming

    @contextlib.contextmanager
    def expected(self, uuid: str) -> Iterator[None]:
        """A guest whose record is there is not looked after before it is added."""
        self._ending.add(uuid)
        try:
            yield
        finally:
            self._ending.discard(uuid)

    def add(self, guest: Guest) -> None:
        """Look after a guest from now on."""
        self.by_uuid[guest.uuid] = guest
        self._ending.discard(guest.uuid)  # of one that had the UUID before
        if guest.port:
            self.by_port[guest.port] = guest

    def adopt(self, record: Record) -> Guest | None:
        """Look after a domain that is running already. None, and a line in the log, if not so."""
        try:
            config = from_dict(record.config | {"name": record.name})
        except ChaosError as error:
            if record.uuid not in self._refused:
                self._refused.add(record.uuid)
                self.daemon.log(f"{record.name} is not looked after: {error}")
            return None
        guest = Guest(record, config)
        if record.noxs and record.store_frame >= 0 and not self._hold(guest):
            self._loop.call_later(RETRY_SECONDS, self._hold_again, guest, RETRY_SECONDS)
        guest.told = guest.ready
        self.add(guest)
        self.daemon.consoles_add(guest)
        self.daemon.emit("adopted", name=guest.name, domid=guest.domid, uuid=guest.uuid)
        return guest

    def _hold(self, guest: Guest) -> bool:
        """Map a guest's page and bind its channel; False: dying, or another process has that."""
        try:
            guest.mapping = self.host.memory.map(guest.domid, [guest.store_frame])
            guest.port = self.host.evtchn.bind_interdomain(guest.domid, guest.store_port)
        except CallFailed:
            guest.let_go(self.host)
            return False
        return True

    def _hold_again(self, guest: Guest, pause: float) -> None:
        if self.daemon.stopping or self.by_uuid.get(guest.uuid) is not guest:
            return
        if not self._hold(guest):
            pause = min(RETRY_MAX, 2 * pause)
            self._loop.call_later(pause, self._hold_again, guest, pause)
            return
        self.by_port[guest.port] = guest
        if guest.ready:  # its event was somebody else's
            guest.told = True
            guest.wake("ready")

    async def adopt_all(self) -> None:
        """Adopt what runs, and end what a killed daemon had not finished."""
        infos = {str(uuid_module.UUID(bytes=i.uuid)): i for i in self.host.ctrl.domain_list()}
        for uuid in self.names.uuids():
            try:
                record = self.names.read(uuid)
            except ChaosError as error:
                self.daemon.log(f"domain {uuid}: {error}")
                continue
            info = infos.get(uuid)
            if record is None or record.state != RUNNING or record.uuid != uuid or info is None:
                continue
            if info.paused and not info.cpu_time and not record.paused:
                self.daemon.log(f"{record.name} was not finished: destroyed")
                try:
                    await self.end(uuid)
                except ChaosError as error:
                    self.daemon.log(f"{record.name}: {error}")
                continue
            guest = self.adopt(record)
            if guest is not None and len(record.macs) == len(guest.config.vifs):
                macs = [bytes.fromhex(mac.replace(":", "")) for mac in record.macs]
                self.daemon.tell_the_bus(guest, macs)  # a killed daemon may not have come to it
        self.restarts.sweep()
        for restart in self.restarts.all():
            if restart.uuid in self.by_uuid:  # its death was not dealt with yet, or it runs again
                self.restarts.drop(restart.uuid)
            else:
                self.daemon.spawn(self._restart(restart))
        self.look_soon()

    def domids(self) -> set[int]:
        """Those of all guests."""
        return {guest.domid for guest in self.by_uuid.values()}

    async def notice_others(self) -> None:
        """Adopt domains that commands without the daemon made meanwhile.

        Where nothing happened, or nothing but to our own, this is one look at a directory, however
        many guests there are: in one that has as many directories as we have domains is no other.
        """
        try:
            status = os.stat(f"{self.names.path}/domains")
        except FileNotFoundError:
            return
        mtime = status.st_mtime_ns
        everything = mtime != self._seen_mtime
        if everything and monotonic() < self._list_by:
            everything = status.st_nlink != LINKS + self._directories()
        if not everything and not self._unsettled:
            return
        # What changes in the same tick of the kernel's clock leaves the time as it is.
        settled = time_ns() - mtime > MTIME_GRAIN
        known = {*self.by_uuid, *self._ending, *self.daemon.pool.uuids()}
        unsettled = self._unsettled

        def read(_host: Host, names: Registry) -> list[tuple[str, Record | None]]:
            found: list[tuple[str, Record | None]] = []
            for uuid in set(names.uuids() if everything else unsettled) - known:
                with contextlib.suppress(ChaosError):  # damaged: chaos list tells of it
                    found.append((uuid, names.read(uuid)))
            return found

        found = await self.daemon.in_thread(read)
        if everything:
            self._seen_mtime = mtime if settled else 0
            self._list_by = monotonic() + LIST_SECONDS
        # One that is being built comes to run without a change in the directory of all.
        self._unsettled = {
            uuid for uuid, record in found if record is not None and record.state == BUILDING
        }
        for uuid, record in found:
            if record is not None and record.state == RUNNING:
                self.lookup(uuid)

    def _directories(self) -> int:
        """How many domains have a directory because of us."""
        leaving = sum(uuid not in self.by_uuid for uuid in self._ending)
        return len(self.by_uuid) + leaving + self.daemon.pool.directories

    def info(self, domid: int, uuid: str) -> DomainInfo | None:
        """What the hypervisor says of a domain; None if another has its number by now."""
        info = self.host.ctrl.domain_info(domid)
        return info if info is not None and info.uuid == uuid_module.UUID(uuid).bytes else None

    def lookup(self, uuid: str) -> Guest | None:
        """The guest of a UUID, adopted if it is not known yet."""
        guest = self.by_uuid.get(uuid)
        if guest is not None or uuid in self._ending:  # in the latter case nobody shall hold it
            return guest
        with contextlib.suppress(ChaosError):
            record = self.names.read(uuid)
            if record is None or record.state != RUNNING or record.uuid != uuid:
                return None
            if self.info(record.domid, uuid) is not None:
                return self.adopt(record)
        return None

    async def find(self, wanted: str) -> Guest:
        """The guest of that name, domid or UUID. StateError."""
        uuid = self.names.uuid_of(wanted) or wanted
        guest = self.by_uuid.get(uuid) or (self.lookup(uuid) if uuid != wanted else None)
        if guest is None:
            # It is looked for on the bus, and what may be left of it is reaped: not on the loop.
            domain = await self.daemon.in_verb_thread(
                lambda host, names: find_domain(host, names, wanted)
            )
            guest = self.lookup(domain.uuid)
        if guest is None:
            raise StateError(
                f'domain "{wanted}" was not made by chaos'
                if domain.record is None
                else unfinished(domain.record),
                hint="use the toolstack that made it" if domain.record is None else "try again",
            )
        if self.names.uuid_of(guest.name) != guest.uuid:
            record = self.names.read(guest.uuid)
            guest.name = record.name if record is not None else guest.name
            if self.daemon.consoles is not None:
                self.daemon.consoles.rename(guest.uuid, guest.name)
        return guest

    # Going

    def look_soon(self) -> None:
        """Find out shortly who died."""
        if self._look is None:
            self._look = self._loop.call_later(self._gathering, self._look_now)

    def _look_now(self) -> None:
        self._look = None
        began = monotonic()
        try:
            news = self._news()
        except CallFailed as error:
            self.daemon.log(f"who died is not known: {error}")
            self._look = self._loop.call_later(RETRY_SECONDS, self._look_now)
            return
        self._gathering = max(COALESCE, (monotonic() - began) * (1 / LOOK_SHARE - 1))
        for guest, info in news:
            if info is None or info.dying:
                self.forget(guest, "destroyed")
                self.daemon.spawn(self._clean(guest.uuid))
            else:
                self._ending.add(guest.uuid)
                self.daemon.spawn(self._bury(guest, info))

    def _news(self) -> list[tuple[Guest, DomainInfo | None]]:
        """Guests that are gone, and those that have shut down with what the hypervisor says.

        Each death has all guests looked at, so little is done for one of which there is no news.
        """
        there = {domid: (flags, uuid) for domid, flags, uuid in self.host.ctrl.domain_states()}
        news: list[tuple[Guest, DomainInfo | None]] = []
        for guest in self.by_uuid.values():
            flags, uuid = there.get(guest.domid, NOBODY)
            if uuid != guest.handle or flags & XEN_DOMINF_dying:
                news.append((guest, None))
            elif flags & XEN_DOMINF_shutdown and guest.uuid not in self._ending:
                news.append((guest, self.info(guest.domid, guest.uuid)))
        return news

    async def _clean(self, uuid: str) -> None:
        """Remove the record of a domain that somebody ended who does not know of records."""
        with contextlib.suppress(ChaosError):
            await self.daemon.in_thread(lambda host, names: reap_one(host, names, uuid))

    def ended(self, uuid: str, domid: int) -> None:
        """Forget a guest that we destroyed, without waiting for the hypervisor to tell of it."""
        guest = self.by_uuid.get(uuid)
        if guest is not None and guest.domid == domid:
            self.forget(guest, "destroyed")

    def forget(self, guest: Guest, how: str) -> None:
        """Hold nothing of a guest any more."""
        if self.by_uuid.get(guest.uuid) is guest:
            self._let_go(guest)
            self._tell_end(guest, how)

    def _let_go(self, guest: Guest) -> None:
        del self.by_uuid[guest.uuid]
        self.by_port.pop(guest.port, None)
        self.daemon.consoles_remove(guest)
        guest.let_go(self.host)
        self._ending.discard(guest.uuid)

    def _tell_end(self, guest: Guest, how: str) -> None:
        guest.wake("dead")
        self.daemon.emit(how, name=guest.name, domid=guest.domid, uuid=guest.uuid)

    async def _bury(self, guest: Guest, info: DomainInfo) -> None:
        """Do what the configuration wants done with a guest that shut down."""
        guest.death = info
        self.daemon.consoles_remove(guest)  # its last words; whoever is attached learns of it
        reason = shutdown_name(info)
        action, warning = afterlife.action_for(guest.config, info)
        words = guest.words()
        self.daemon.emit(
            "died",
            name=guest.name,
            domid=guest.domid,
            uuid=guest.uuid,
            reason=reason,
            action=action,
            exit_code=words.exit_code if words else None,
            message=(words.message or None) if words else None,
        )
        if warning:
            self.daemon.log(f"{guest.name}: {warning}")
        guest.wake("dead")
        try:
            await self._obey(guest, action)
        except Exception as error:  # noqa: BLE001 - a guest that nobody buries keeps its memory
            if not isinstance(error, (ChaosError, OSError)):
                self._ending.discard(guest.uuid)  # the next look finds it again
            self.daemon.emit("problem", what=f"{action} of {guest.name}: {error}")
            self.daemon.log(f"{action} of {guest.name} failed: {error}")
            if action != "destroy":
                self.daemon.emit(
                    "restart failed", name=guest.name, uuid=guest.uuid, what=str(error)
                )

    async def _obey(self, guest: Guest, action: str) -> None:
        if action == "preserve" or self.daemon.stopping:
            return
        uuid, domid = guest.uuid, guest.domid
        record = await self.daemon.in_thread(lambda _host, names: _record_of(names, uuid, domid))
        if record is None:
            if action != "destroy":
                self.daemon.emit("restart called off", name=guest.name, uuid=uuid)
            return
        failures = guest.failures + 1 if monotonic() - guest.born < afterlife.YOUNG else 0
        restart = _restart_of(guest, record, failures)
        if action != "destroy":
            await self._insist(guest, lambda _host, names: self._plan(restart, names))
        last = await self._take_away(guest, action, restart)
        if uuid not in self.by_uuid:
            self._ending.discard(uuid)
            self._unsettled.add(uuid)  # another command may have made one of that UUID meanwhile
        if action != "destroy":
            await self._restart(last)

    async def _take_away(self, guest: Guest, action: str, restart: Restart) -> Restart:
        """Destroy a dead domain, or set it aside: its restart with what it had at its very end."""
        uuid, domid = guest.uuid, guest.domid
        last = restart

        def renew(record: Record) -> None:
            """Others may have changed its devices until now, when they cannot any more."""
            nonlocal last
            last = _restart_of(guest, record, restart.failures)
            if last != restart and self.restarts.holds(uuid):
                with contextlib.suppress(StateError):  # no room, which the domain's end makes
                    self.restarts.write(last)

        if action == "rename-restart":
            kept = await self._insist(
                guest, lambda host, names: afterlife.set_aside(host, names, uuid, domid, renew)
            )
            self.forget(guest, "set aside")
            if kept is not None:
                self._keep(kept)
        else:
            if self.by_uuid.get(uuid) is guest:
                self._let_go(guest)
            await self._insist(guest, lambda host, names: _destroy(host, names, uuid, domid, renew))
            self._tell_end(guest, "destroyed")
        return last

    def _plan(self, restart: Restart, names: Registry) -> None:
        """Write a restart down, unless somebody has destroyed the dead domain by now."""
        self.restarts.write(restart)
        # Whoever destroys it from now on finds what we wrote.
        if _record_of(names, restart.uuid, restart.domid) is None:
            self.restarts.drop(restart.uuid)

    def _keep(self, uuid: str) -> None:
        """Look after a dead domain that was set aside, until it is destroyed."""
        with contextlib.suppress(ChaosError):
            record = self.names.read(uuid)
            if record is not None:
                dead = self.adopt(record)
                self._ending.add(uuid)
                if dead is not None:
                    self.daemon.consoles_remove(dead)

    async def _insist(self, guest: Guest, function: Callable[[Host, Registry], T]) -> T | None:
        """Do what a death calls for, if need be again and again.

        None: the domain is gone, whoever has its UUID now.
        """
        uuid, domid, failures = guest.uuid, guest.domid, 0

        def attempt(host: Host, names: Registry) -> T | None:
            there = _record_of(names, uuid, domid) is not None
            return function(host, names) if there else None

        while self.by_uuid.get(uuid, guest) is guest:
            self._ending.add(uuid)  # whoever looks at it meanwhile finds it dead, and dealt with
            try:
                return await self.daemon.in_thread(attempt)
            except (ChaosError, OSError) as error:
                failures += 1
                pause = afterlife.delay(failures)
                self.daemon.emit(
                    "problem", what=f"the end of {guest.name}, again in {pause:.0f} s: {error}"
                )
                self.daemon.log(f"the end of {guest.name} failed: {error}")
            await asyncio.sleep(pause)
        return None

    async def _restart(self, restart: Restart) -> None:
        """Create the successor of a domain, in time. An error, and then it is given up."""
        pause = afterlife.delay(restart.failures)
        name, uuid = restart.config.name, restart.uuid
        if pause:
            self.daemon.emit("restart waits", name=name, uuid=uuid, seconds=pause)
            await asyncio.sleep(pause)
        tries, again = 0, None
        while again is None:
            if not self.restarts.holds(uuid):
                self.daemon.emit("restart called off", name=name, uuid=uuid)
                return
            try:
                again = await self.daemon.create_again(
                    restart.config, uuid_module.UUID(uuid).bytes, restart.owner
                )
            except Exception as error:
                tries += 1
                if isinstance(error.__cause__ or error, LASTING) or tries == RESTART_TRIES:
                    self.restarts.drop(uuid)
                    raise
                pause = afterlife.delay(tries)
                what = f"the restart of {name}, again in {pause:.0f} s: {error}"
                self.daemon.emit("problem", what=what, uuid=uuid)
                self.daemon.log(what)
                await asyncio.sleep(pause)
        again.failures = restart.failures
        if not self.restarts.drop(uuid):  # called off while it was made
            await self.end(uuid)

    async def end(self, uuid: str) -> None:
        """Destroy a domain with its devices, and forget it. ChaosError."""
        guest = self.by_uuid.get(uuid)
        if guest is not None:
            self._let_go(guest)  # or Xen keeps what we map
        try:
            await self.daemon.in_thread(lambda host, names: _destroy(host, names, uuid))
        except BaseException:
            if guest is not None:
                guest.wake("dead")
            raise
        if guest is not None:
            self._tell_end(guest, "destroyed")


def _record_of(names: Registry, uuid: str, domid: int) -> Record | None:
    """The record of a domain; None if that is gone, whoever has its UUID now."""
    record = names.read(uuid)
    return record if record is not None and record.domid == domid else None


def _restart_of(guest: Guest, record: Record, failures: int) -> Restart:
    """The restart of a guest with the devices that its record has now."""
    config = afterlife.successor(guest.config, record)
    return Restart(guest.uuid, config, failures, guest.domid, record.owner)


def _destroy(
    host: Host,
    names: Registry,
    uuid: str,
    domid: int | None = None,
    ending: Callable[[Record], None] | None = None,
) -> None:
    """Destroy the domain of a UUID, with ``domid`` only one of that number. ChaosError."""
    if names.read(uuid) is not None:
        domain = find_domain(host, names, uuid)
        if domid in {None, domain.domid}:
            destroy(host, names, domain, ending=ending)
