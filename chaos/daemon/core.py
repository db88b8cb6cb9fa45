"""The daemon's core: it owns the pool, the guests, their consoles and the events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, TypeVar

from chaos import disk, store, vif, xenstored
from chaos.create import IMAGE_STEPS, SHELL_STEPS, check_disks
from chaos.daemon.batches import Batches
from chaos.daemon.consoles import ConsoleHub
from chaos.daemon.events import Events
from chaos.daemon.guests import Guest, Guests
from chaos.daemon.pool import Pool
from chaos.daemon.rights import ROOT, peer_for
from chaos.daemon.shell import DELIVERY_STEPS, PAUSED_STEPS, UNPAUSE_STEPS, Delivery
from chaos.daemon.template import Template
from chaos.daemon.wanted import Reader, TooLong, Wanted, want
from chaos.domains import check_free, reap
from chaos.host import Host
from chaos.image import inspect
from chaos.registry import DAEMON_LOCK, RUNNING, Registry
from chaos.steps import perform, profile_of, roll_back, spent
from noxs import lockfile
from xenctypes.errors import ChaosError, PageError, PermissionDenied, StateError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from chaos.daemon.rights import Peer
    from chaos.daemon.settings import Settings
    from chaos.daemon.shell import Shell
    from chaos.diskspec import DiskConfig
    from chaos.domconfig import DomainConfig
    from chaos.image import OpenImage
    from chaos.invocation import Report

T = TypeVar("T")

THREADS = 16
VERB_THREADS = 64
WAIT_THREADS = 64
CLOSE_SECONDS = 20.0
"""How long threads may take to end at the end."""
FINISH_SECONDS = 5.0
"""How long work may take at the end that was gathered until then."""
TICK = 2.0
MAC_REFRESH = 30.0


def _disk_entries(
    host: Host, names: Registry, uuid: str, configs: Sequence[DiskConfig]
) -> list[dict[str, Any]]:
    """What the record of a domain is to say of disks that it can have. DeviceError."""
    return list(map(disk.entry, configs, check_disks(host, names, uuid, configs)))


def announce(host: Host, names: Registry, domid: int, uuid: str) -> None:
    """Let xl know a guest by its name, while others may rename or destroy it. Raises BusError."""
    told = ""
    while True:
        record = names.read(uuid)
        if record is None or record.state != RUNNING:
            xenstored.withdraw(host, domid)  # its end may have looked there before we wrote
            return
        if record.name == told:
            return
        told = record.name
        xenstored.announce(host, domid, told)


def counted(report: Report, total: int) -> Callable[[str], None]:
    """What counts steps, as their names are told, for a report."""
    numbers = itertools.count(1)
    return lambda step: report(step, next(numbers), total)


class Daemon:
    """chaosd without its socket. Lives on one event loop; Xen's handles are that thread's.

    ``template`` is what its shell makers are forked from, if there is one already.
    """

    def __init__(
        self, settings: Settings, names: Registry, template: Template | None = None
    ) -> None:
        self.settings = settings
        self.names = names
        self.host = Host()
        self.loop = asyncio.get_running_loop()
        self.events = Events()
        self.reader = Reader()
        self.stopping = False
        self.beside_xenstored = False
        self._on_the_bus = Batches(self.spawn, self._tell_the_bus)
        self._ready = Batches(self.spawn, self._write_ready)
        self._lock_fd = -1
        self._local = threading.local()
        self._hosts: list[Host] = []
        self._threads = ThreadPoolExecutor(THREADS, "work")
        self._verbs = ThreadPoolExecutor(VERB_THREADS, "verb")
        self._waits = ThreadPoolExecutor(WAIT_THREADS, "wait")
        self._calls: set[Future[Any]] = set()
        self.stuck = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._dom0_macs: frozenset[str] = frozenset()
        self.guests = Guests(self)
        self.template = template or Template(names.path)
        self.pool = Pool(self.host, names, settings, self.in_thread, self.emit, self.template)
        self.consoles: ConsoleHub | None = None

    # Life

    async def start(self) -> None:
        """Take over this host: reap what was left unfinished, adopt what runs. ChaosError."""
        self.names.prepare()
        self._lock_fd = self._lock()
        self.host.ctrl.physinfo()
        self.beside_xenstored = xenstored.serves(self.host)
        problems: list[str] = []
        reap(self.host, self.names, self.host.ctrl.domain_list(), problems, shells=True)
        for problem in problems:
            self.log(problem)
        with self.names.locked():
            self.names.sweep()  # links of a daemon that was killed in the middle of a create
        self.consoles = ConsoleHub(self.host, report=self.log, path=self.names.path)
        self.guests.start()
        await self.guests.adopt_all()
        self.pool.start()
        self.spawn(self._housekeeping())

    async def close(self) -> None:
        """Give the pool back and let go of the guests, which go on running."""
        self.stopping = True
        self.events.close()
        await self._finish()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pool.close()
        self.template.close()
        if self.consoles is not None:
            self.consoles.close()
        await self._end_threads()
        if self.stuck:
            return  # their handles and the lock go with the process
        for host in self._hosts:
            host.close()
        self.host.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)

    async def _finish(self) -> None:
        """Do what has waited for more of its kind, if that is possible in a moment."""
        work = [self.spawn(batches.finish()) for batches in (self._on_the_bus, self._ready)]
        _, late = await asyncio.wait(work, timeout=FINISH_SECONDS)
        if late:
            self.log(f"the bus or /run did not take all within {FINISH_SECONDS:.0f} s")

    async def _end_threads(self) -> None:
        for threads in (self._waits, self._verbs, self._threads):
            threads.shutdown(wait=False, cancel_futures=True)
        calls = [asyncio.wrap_future(call) for call in list(self._calls)]
        if not calls:
            return
        _, late = await asyncio.wait(calls, timeout=CLOSE_SECONDS)
        if late:
            self.stuck = True
            self.log(f"{len(late)} threads did not end within {CLOSE_SECONDS:.0f} s")

    def _lock(self) -> int:
        path = f"{self.names.path}/{DAEMON_LOCK}"
        return lockfile.take(path, "chaosd", StateError, hint="stop it first")

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a coroutine that ends with the daemon; its failure is logged."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)
        return task

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.log(f"a task failed: {task.exception()!r}")

    async def in_thread(self, function: Callable[[Host, Registry], T]) -> T:
        """Run something that may block where it holds nobody up, with a Host of its own."""
        return await self._call(self._threads, function)

    async def in_verb_thread(self, function: Callable[[Host, Registry], T]) -> T:
        """The same for a command's verb, which may take its time."""
        return await self._call(self._verbs, function)

    async def in_wait_thread(self, function: Callable[[Host, Registry], T]) -> T:
        """The same for a verb that waits for guests, which may take as long as its user likes."""
        return await self._call(self._waits, function)

    async def _call(
        self, threads: ThreadPoolExecutor, function: Callable[[Host, Registry], T]
    ) -> T:
        call = threads.submit(self._with_host, function)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await asyncio.wrap_future(call)

    def _with_host(self, function: Callable[[Host, Registry], T]) -> T:
        host = getattr(self._local, "host", None)
        if host is None:
            host = self._local.host = Host()
            self._hosts.append(host)
        return function(host, Registry(self.names.path))

    def emit(self, kind: str, **data: Any) -> None:
        """Tell of an event."""
        self.events.emit(kind, **data)

    def tell(self, kind: str, **data: Any) -> None:
        """Tell of an event, from any thread."""
        self.loop.call_soon_threadsafe(functools.partial(self.emit, kind, **data))

    def log(self, message: str) -> None:
        """One line for the service manager's log."""
        sys.stderr.write(f"chaosd: {message}\n")
        sys.stderr.flush()

    async def _housekeeping(self) -> None:
        due = 0.0
        while True:
            now = self.loop.time()
            if now >= due:
                due = now + MAC_REFRESH
                await self._refresh_macs()
            await asyncio.sleep(TICK)
            try:
                await self.guests.notice_others()
            except Exception as error:  # noqa: BLE001 - the next tick may have better luck
                self.log(f"domains of other commands were not looked for: {error}")

    # Creating

    async def read(self, peer: Peer, directory: str, path: str, overrides: Sequence[str]) -> Wanted:
        """The configuration in a file, with overrides. ConfigError; NotHere."""
        try:
            return self.reader.read(peer, directory, path, overrides)
        except TooLong as long:
            later = long
        wanted = await self.in_verb_thread(lambda *_: later.read())
        later.keep(wanted)
        return wanted if later.name is None else wanted.named(later.name)

    async def create(
        self,
        wanted: Wanted,
        peer: Peer = ROOT,
        *,
        paused: bool = False,
        again: bool = False,
        report: Report | None = None,
    ) -> Delivery:
        """A guest of the wanted configuration, from the pool or made now. ChaosError.

        ``again``: the peer had it before, and its disks from root. ``report`` hears of the steps in
        which a shell is made, if it has to be.
        """
        if self._mac_seems_taken(wanted):
            await self._refresh_macs()  # whoever had it may be gone
        with self.pool.attending():
            shell = self._from_pool(wanted, peer)
            if shell is None:
                shell = await self._made(wanted, peer, report, again=again)
            if shell.store:
                return await self._deliver_stock(shell, wanted, peer, paused=paused)
            return self._deliver(shell, wanted, peer, paused=paused)

    def create_now(self, wanted: Wanted, peer: Peer, *, paused: bool = False) -> Delivery | None:
        """The same from a warm shell; None if there is none, or if it takes longer. ChaosError."""
        if self._mac_seems_taken(wanted):
            return None
        key = wanted.key(peer)
        if self.pool.has_store(wanted.shape, key):
            return None
        shell = self.pool.take(wanted.shape, key, wanted.pages)
        return None if shell is None else self._deliver(shell, wanted, peer, paused=paused)

    def _mac_seems_taken(self, wanted: Wanted) -> bool:
        taken = self._dom0_macs
        return any(config.mac_text in taken for config in wanted.config.vifs if config.mac)

    async def _refresh_macs(self) -> None:
        """Look at the addresses that Dom0 and other toolstacks' guests have."""
        ours = self.guests.domids() | self.pool.domids()
        with contextlib.suppress(ChaosError, OSError):
            macs = await self.in_thread(lambda host, _: vif.taken_macs(host.bus, ours))
            self._dom0_macs = frozenset(macs)

    def _from_pool(self, wanted: Wanted, peer: Peer) -> Shell | None:
        """A warm shell, if there is one; a stock guest's has all but the disks."""
        shape, key = wanted.shape, wanted.key(peer)
        if not shape.disks:
            return self.pool.take(shape, key, wanted.pages)
        shape = shape._replace(disks=())
        if peer.uid or not self.pool.has_store(shape, key):
            return None
        return self.pool.take(shape, key, 0)

    async def _made(
        self, wanted: Wanted, peer: Peer, report: Report | None, *, again: bool = False
    ) -> Shell:
        if wanted.config.disks and peer.uid and not again:
            raise PermissionDenied(
                "only root may create guests with disks", hint="a disk is any file of the host"
            )
        if self.names.uuid_of(wanted.config.name) is not None:
            # Sooner than after building it all; whoever holds the name may be gone, though.
            name = wanted.config.name
            await self.in_thread(lambda host, names: check_free(host, names, name))
        opened = wanted.open(peer)
        try:
            disks = wanted.config.disks
            if not disks:
                self.pool.note(wanted.config, wanted.source, opened)
            shell = None
            if await self._takes_generic(wanted, opened):
                shell = self.pool.take(wanted.shape, None, wanted.pages)
            if shell is not None:
                told = report and counted(report, len(IMAGE_STEPS))
                return await self.pool.load(shell, wanted.config, wanted.source, opened, told)
            told = report and counted(report, len(SHELL_STEPS + IMAGE_STEPS))
            room = len(wanted.config.metadata)
            shell = await self.pool.order(
                wanted.config, wanted.source, opened, room=room, told=told
            )
            if disks and shell.store:
                # Others like it can be served by shells without disks.
                try:
                    self.pool.note(replace(wanted.config, disks=()), wanted.source, opened)
                except BaseException:
                    self.pool.spawn(self.pool.discard(shell))
                    raise
            return shell
        finally:
            for each in opened:
                each.close()

    async def _takes_generic(self, wanted: Wanted, opened: Sequence[OpenImage]) -> bool:
        """Whether a shell without an image does: its vifs are connected as noxs guests want it."""
        if not wanted.config.vifs or not self.pool.shelves.get((wanted.shape, None)):
            return True
        info = await self.in_thread(lambda *_: inspect(opened[0], payload=False))
        return info.noxs_abi is not None

    def _deliver(self, shell: Shell, wanted: Wanted, peer: Peer, *, paused: bool) -> Delivery:
        config = wanted.config
        delivery = Delivery(shell, config, wanted.json, peer, self._dom0_macs, paused)
        try:
            perform(
                PAUSED_STEPS if paused else DELIVERY_STEPS,
                delivery,
                delivery.timings,
                subject=f'cannot create "{config.name}"',
            )
        except ChaosError as error:
            if not config.disks and self._is_as_before(shell, error):
                self.pool.put_back(shell)
            else:
                self.pool.spawn(self.pool.discard(shell))
            raise
        guest = self._guest(delivery)
        self.loop.call_soon(self._settle, guest, delivery)
        return delivery

    async def _deliver_stock(
        self, shell: Shell, wanted: Wanted, peer: Peer, *, paused: bool
    ) -> Delivery:
        """Deliver a stock guest; if nobody waits for it any more it is destroyed."""
        work = self._deliver_with_store(shell, wanted, peer, paused=paused)
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._unwanted)
            raise

    def _unwanted(self, task: asyncio.Task[Delivery]) -> None:
        if not task.cancelled() and task.exception() is None and not self.stopping:
            self.spawn(self.guests.end(task.result().shell.uuid))

    async def _deliver_with_store(
        self, shell: Shell, wanted: Wanted, peer: Peer, *, paused: bool
    ) -> Delivery:
        """The same for a stock guest, whose store and devices are told its name and addresses.

        With another UUID they are made anew; disks that the shell does not have are attached. A
        shell that this fails for is not used again, unless nothing was done to it.
        """
        config = wanted.config
        late = store.LATE_STEPS
        if await self._takes_late_disks(shell, config):
            late += store.DISK_STEPS
        delivery = Delivery(
            shell, config, wanted.json, peer, self._dom0_macs, paused=paused, bare=True
        )
        subject = f'cannot create "{config.name}"'
        begun = False

        def furnish(host: Host, names: Registry) -> None:
            with names.entry(shell.uuid) as entry:
                info = host.ctrl.domain_info(shell.domid)
                if not entry.lock(wait=False) or info is None or not info.paused:
                    raise StateError("somebody else destroyed it or let it run")
                tenancy, steps = delivery.tenancy(host), late
                if delivery.shell_uuid:
                    # What its devices left is cleared when the store is opened anew.
                    store.release(host, shell.store, shell.domid, delivery.shell_uuid)
                    steps = store.STEPS
                perform(steps, tenancy, delivery.timings, subject=subject)
                delivery.bare = False
                if not paused:
                    return
                with names.locked():
                    record = names.read(shell.uuid)
                    if record is not None:
                        record.paused = True
                        entry.write(record)

        try:
            perform(PAUSED_STEPS, delivery, delivery.timings, subject=subject)
            begun = True
            with self.guests.expected(shell.uuid):
                await self.in_thread(furnish)
                if not paused:
                    perform(UNPAUSE_STEPS, delivery, delivery.timings, subject=subject)
                guest = self._guest(delivery)
        except BaseException:
            if begun:
                roll_back(PAUSED_STEPS, delivery)
            self.pool.spawn(self.pool.discard(shell))
            raise
        self.loop.call_soon(self._settle, guest, delivery)
        return delivery

    async def _takes_late_disks(self, shell: Shell, config: DomainConfig) -> bool:
        """Whether a shell lacks the guest's disks, which it can have; else it is put back.

        Raises DeviceError.
        """
        if not config.disks or shell.disks:
            return False
        try:
            shell.disks = await self.in_thread(
                lambda host, names: _disk_entries(host, names, shell.uuid, config.disks)
            )
        except BaseException:
            self.pool.put_back(shell)
            raise
        return True

    def _is_as_before(self, shell: Shell, error: ChaosError) -> bool:
        """Whether nothing is left in a shell of a delivery that failed with that error."""
        refused = isinstance(error.__cause__ or error, (StateError, PageError))
        if not refused or getattr(error, "__notes__", None):  # the notes: what was not undone
            return False
        info = self.guests.info(shell.domid, shell.uuid)
        # Another toolstack may have destroyed it, or let it run.
        return info is not None and info.paused and not info.dying and not info.cpu_time

    def ended(self, uuid: str, domid: int) -> None:
        """Let go of a guest that a verb destroyed; from the verb's thread, before its reply."""
        self.loop.call_soon_threadsafe(self.guests.ended, uuid, domid)

    def unpause(self, delivery: Delivery) -> None:
        """Let a guest that was delivered paused run."""
        guest = self.guests.by_uuid.get(delivery.shell.uuid)
        if guest is not None:
            guest.unpaused_ns = perf_counter_ns()
            self.host.ctrl.domain_unpause(guest.domid)

    def _guest(self, delivery: Delivery) -> Guest:
        shell = delivery.shell
        record, since = delivery.recorded, delivery.timings[-1].end
        assert record is not None
        guest = Guest(record, delivery.config, since)
        guest.mapping, shell.mapping = shell.mapping, None
        guest.port, shell.port = shell.port, 0
        guest.unpaused_ns = since if delivery.running else 0
        self.guests.add(guest)
        return guest

    def _settle(self, guest: Guest, delivery: Delivery) -> None:
        """What can wait until the reply is out."""
        delivery.shell.close_record()
        self.emit(
            "created",
            name=guest.name,
            domid=guest.domid,
            uuid=guest.uuid,
            paused=delivery.paused,
            by={"uid": delivery.peer.uid, "pid": delivery.peer.pid},
        )
        self.consoles_add(guest)
        self.tell_the_bus(guest, delivery.shell.macs)

    def tell_the_bus(self, guest: Guest, macs: list[bytes]) -> None:
        """Have the bus know a guest's name and addresses soon, if anybody looks there."""
        # A stock guest's store and devices were given its name when they were made.
        if guest.noxs and (guest.config.vifs or self.beside_xenstored):
            self._on_the_bus.add((guest, macs))

    async def _tell_the_bus(self, batch: list[tuple[Guest, list[bytes]]]) -> None:
        """What guests are called and what their addresses are, for whoever looks at the bus."""
        try:
            await self.in_thread(functools.partial(self._tell, batch))
        except ChaosError as error:
            names = ", ".join(guest.name for guest, _ in batch)
            self.log(f"the bus was not told the names {names}: {error}")

    def _tell(self, batch: list[tuple[Guest, list[bytes]]], host: Host, names: Registry) -> None:
        living = [(guest, macs) for guest, macs in batch if guest.uuid in self.guests.by_uuid]
        pairs = []
        for guest, macs in living:
            pairs += vif.late_nodes(guest.domid, guest.name, macs, guest.config.vifs)
        if pairs:
            vif.update(host.bus, pairs)
        for guest, _ in living if self.beside_xenstored else ():
            announce(host, names, guest.domid, guest.uuid)

    async def create_again(
        self, config: DomainConfig, uuid: bytes, owner: dict[str, Any] | None
    ) -> Guest:
        """The successor of a guest that died, made with its owner's rights. ChaosError."""
        wanted = want(replace(config, uuid=uuid))
        delivery = await self.create(wanted, peer_for(owner), again=True)
        return self.guests.by_uuid[delivery.shell.uuid]

    def describe(self, delivery: Delivery) -> dict[str, Any]:
        """A delivery as ``chaos create --json`` shows it."""
        guest = self.guests.by_uuid.get(delivery.shell.uuid)
        config = delivery.config
        return {
            "name": config.name,
            "domid": delivery.shell.domid,
            "uuid": delivery.shell.uuid,
            "type": config.type,
            "memory_mib": config.memory,
            "vcpus": config.vcpus,
            "noxs": delivery.shell.noxs,
            "paused": delivery.paused,
            "profile": profile_of(
                delivery.shell.spent + spent(delivery.timings), guest.ready_ms if guest else None
            ),
        }

    # Waiting

    async def wait(self, uuid: str, seconds: float | None, *, dead: bool = False) -> str:
        """Wait until a guest is ready or dead, or only dead: "ready", "dead" or "timeout"."""
        deadline = None if seconds is None else self.loop.time() + seconds
        while True:
            guest = self.guests.by_uuid.get(uuid)
            if guest is None or self._is_dead(guest):
                return "dead"
            if not dead and guest.ready:
                if guest.unpaused_ns:  # its event may still wait to be taken
                    self.guests.heard(guest, perf_counter_ns())
                return "ready"
            waiter = self.loop.create_future()
            guest.waiters = [*(guest.waiters or ()), waiter]
            left = None if deadline is None else deadline - self.loop.time()
            try:
                await asyncio.wait_for(waiter, left)
            except TimeoutError:
                return "timeout"
            finally:
                if guest.waiters and waiter in guest.waiters:
                    guest.waiters.remove(waiter)

    def _is_dead(self, guest: Guest) -> bool:
        info = self.guests.info(guest.domid, guest.uuid)
        return info is None or info.shutdown or info.dying

    def write_ready(self, guest: Guest) -> None:
        """Keep in the record when the guest was ready."""
        self._ready.add(guest)

    async def _write_ready(self, batch: list[Guest]) -> None:
        def work(_host: Host, names: Registry) -> None:
            # Not the domain's own lock, which a destroy would take for somebody else's work: a
            # rename holds this one too, and of a domain that goes meanwhile nothing is left.
            for guest in batch:
                # One that cannot be written, /run being full, is nothing to the others.
                with contextlib.suppress(OSError, StateError), names.locked():
                    record = names.read(guest.uuid)
                    if record is not None and record.state == RUNNING:
                        record.ready_ms = guest.ready_ms
                        names.entry(guest.uuid).write(record)

        await self.in_thread(work)

    def renamed(self, uuid: str, name: str) -> None:
        """A guest has another name; for any thread."""
        self.loop.call_soon_threadsafe(self._renamed, uuid, name)

    def _renamed(self, uuid: str, name: str) -> None:
        guest = self.guests.by_uuid.get(uuid)
        if guest is not None:
            self.emit("renamed", name=name, before=guest.name, domid=guest.domid, uuid=uuid)
            guest.name = name
            if self.consoles is not None:
                self.consoles.rename(uuid, name)

    # Consoles

    def consoles_add(self, guest: Guest) -> None:
        """Have a guest's console drained from now on."""
        if self.consoles is None or guest.console_frame < 0:
            return
        try:
            self.consoles.add(
                guest.uuid,
                guest.name,
                guest.domid,
                guest.console_frame,
                guest.console_port,
                f"{self.names.path}/domains/{guest.uuid}",
            )
        except (ChaosError, OSError) as error:
            if guest.uuid in self.guests.by_uuid:
                self.log(f"the console of {guest.name} is not kept: {error}")

    def consoles_remove(self, guest: Guest) -> None:
        """Take what is left of a guest's console, and let go of it."""
        if self.consoles is not None:
            self.consoles.remove(guest.uuid)

    async def find(self, wanted: str) -> Guest:
        """The guest of that name, domid or UUID. StateError."""
        return await self.guests.find(wanted)
