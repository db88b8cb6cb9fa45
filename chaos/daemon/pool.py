"""The pool of shells: what is ready, what is made next, and what is given back.

::

    flavour --refill--> maker --> shelf --take--> delivery --> guest
                                    |
                                    +--> discarded: its image changed, memory is short,
                                         the flavour is gone

A shelf is keyed by what cannot change late: the shape and, for warm shells, the version of the
image file. So a shell of an old image is never taken, however the drain is doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid as uuid_module
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

import msgpack

from chaos import image, pvh
from chaos.create import MIB_SHIFT
from chaos.daemon.flavour import Flavour, Source
from chaos.daemon.settings import FLAVOURS_MAX
from chaos.daemon.shell import Shell
from chaos.daemon.workers import DELAYS, Worker
from chaos.domains import reap, reap_one
from chaos.invocation import unreported
from chaos.registry import SHELL, Record
from chaos.shape import ImageKey, Shape, blank, shape_of
from noxs.page import more_pages
from xenctypes.errors import ChaosError, StateError, XenError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

    from chaos.daemon.settings import FlavourSpec, Settings
    from chaos.daemon.template import Template
    from chaos.domconfig import DomainConfig
    from chaos.host import Host
    from chaos.image import OpenImage
    from chaos.invocation import Report
    from chaos.registry import Registry

Key = tuple[Shape, ImageKey | None]

QUIET = 0.2
"""Seconds without a create after which a flavour that is not low is refilled."""
ATTENTION = 0.25
"""Seconds that a refill waits at most for creates that are under way, however much it lacks."""
TICK = 1.0
DIGEST_SECONDS = 60.0
"""How long until a flavour's image is read again, to see whether its contents are the same."""
DIGEST_SHARE = 0.001
"""How much of the time that reading may take at most."""
OVERHEAD_MIB = 2
"""What any domain takes of the hypervisor beside its memory, roughly."""
ASKED_OFTEN = 3
ASKED_WITHIN = 60.0
ASKED_MAX = 256
TOLD_MAX = 256
"""Configurations that are kept as makers are told them."""
ADAPTIVE_MAX = 16
ADAPTIVE = "adaptive-"
NOT_REFILLED, NOT_TIDIED = "the pool is not refilled", "the pool is not looked after"


class Pool:
    """All flavours, their shells and the makers. Lives on one event loop.

    ``in_thread`` runs ``function(host, names)`` where it may block; ``emit`` tells of an event.
    """

    def __init__(
        self,
        host: Host,
        names: Registry,
        settings: Settings,
        in_thread: Callable[[Callable[[Host, Registry], Any]], Awaitable[Any]],
        emit: Callable[..., None],
        template: Template,
    ) -> None:
        self.host = host
        self.names = names
        self.settings = settings
        self.in_thread = in_thread
        self.emit = emit
        self.template = template
        self.flavours: dict[str, Flavour] = {}
        self.shelves: dict[Key, deque[Shell]] = {}
        self.workers: list[Worker] = []
        self.deaths = 0
        self.closing = False
        self._asked: OrderedDict[Key, deque[float]] = OrderedDict()
        self._told: OrderedDict[tuple[Shape, str, str, str], bytes] = OrderedDict()
        self._loop = asyncio.get_running_loop()
        self._quiet_from = 0.0
        self._attended = 0  # creates that are under way
        self._attended_until = 0.0
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._counter = 0
        self._seeking = 0
        self._under_way = 0  # shells that are being made
        self._promised = 0  # MiB, to creates that are under way
        self._ending = 0  # shells that are being given back
        self._lacking: dict[Flavour, str] = {}  # at the last look
        self._problems: dict[str, str] = {}
        self._changes: list[asyncio.Future[None]] = []

    # Life

    def start(self) -> None:
        """Start the makers and the refill."""
        for _ in range(self.settings.builders):
            self._hire()
        for spec in self.settings.flavours:
            self.add(spec)
        self._loops = [self.spawn(self._refill()), self.spawn(self._housekeeping())]

    async def close(self) -> None:
        """End the makers and give every shell back."""
        self.closing = True
        for task in self._loops:
            task.cancel()
        for worker in list(self.workers):
            worker.end("the daemon ends")
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # Whatever the makers had begun, and every shell there is: none of them has a name.
        for flavour in self.flavours.values():
            for shell in flavour.shells:
                self._let_go(shell)
        await self.in_thread(_reap_shells)

    def spawn(self, work: Any) -> asyncio.Task[Any]:
        """Run a coroutine that ends with the pool; its failure is told."""
        task = self._begin(work)
        task.add_done_callback(self._spawned)
        return task

    def _begin(self, work: Any) -> asyncio.Task[Any]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _spawned(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._tell("a task of the pool failed", task.exception())

    def _tell(self, what: str, error: object) -> None:
        """Tell of a problem of the pool as a whole, once for as long as it stays the same."""
        if self._problems.get(what) != str(error):
            self._problems[what] = str(error)
            self.emit("problem", what=f"{what}: {error}")

    def _hire(self) -> None:
        if not self.closing:
            self.workers.append(Worker(self.template, self._worker_ended, self._wake.set))

    def _worker_ended(self, worker: Worker) -> None:
        """A maker died: what it held goes, and another takes its place, later and later."""
        self.workers.remove(worker)
        lost = [
            shell
            for flavour in self.flavours.values()
            for shell in flavour.shells
            if shell.worker is worker
        ]
        for shell in lost:
            shell.worker = None
            self._retire(shell)
        if not self.closing:
            delay = DELAYS[min(self.deaths, len(DELAYS) - 1)]
            self.deaths += 1
            self.emit("maker died", pid=worker.pid, replaced_in_s=delay)
            self._loop.call_later(delay, self._hire)

    # Flavours

    def add(self, spec: FlavourSpec) -> Flavour:
        """A new flavour. StateError if its name is taken, or if there are too many."""
        if spec.name in self.flavours:
            raise StateError(f'a flavour named "{spec.name}" exists already')
        if sum(not flavour.adaptive for flavour in self.flavours.values()) >= FLAVOURS_MAX:
            raise StateError(
                f"there are {FLAVOURS_MAX} flavours already", hint="chaos pool remove one of them"
            )
        config = spec.config
        source = Source(config.kernel, config.ramdisk, config.cmdline) if config.kernel else None
        return self._add(
            Flavour(spec.name, config, spec.size, spec.low, spec.metadata, shape_of(config), source)
        )

    def _add(self, flavour: Flavour) -> Flavour:
        self.flavours[flavour.name] = flavour
        flavour.asked = self._loop.time()
        self.emit("pool added", flavour=flavour.name, size=flavour.size)
        self._wake.set()
        return flavour

    def flavour(self, name: str) -> Flavour:
        """The flavour of that name. StateError."""
        found = self.flavours.get(name)
        if found is None:
            raise StateError(f'no flavour "{name}"', hint="chaos pool list shows them")
        return found

    def _has(self, flavour: Flavour) -> bool:
        """Whether it was not removed meanwhile."""
        return self.flavours.get(flavour.name) is flavour

    def resize(self, name: str, size: int, low: int | None = None) -> Flavour:
        """Another size; shells beyond it are given back."""
        flavour = self.flavour(name)
        flavour.size = size
        self._changed()
        flavour.low = flavour.low if low is None else low
        self.emit("pool resized", flavour=name, size=size)
        self._shrink(flavour)
        self._wake.set()
        return flavour

    def _shrink(self, flavour: Flavour) -> None:
        """Give back the shells that a flavour has beyond its size."""
        while flavour.missing < 0 and flavour.shells:
            self._retire(next(iter(flavour.shells)))

    async def drain(self, name: str, report: Report = unreported) -> int:
        """Give back all shells that a flavour has now, which is then refilled; how many."""
        count = await self._give_back(self.flavour(name), report)
        self.emit("pool drained", flavour=name, shells=count)
        self._wake.set()
        return count

    async def remove(self, name: str, report: Report = unreported) -> None:
        """Forget a flavour and give its shells back."""
        flavour = self.flavour(name)
        flavour.size = 0
        self._changed()
        del self.flavours[name]
        if flavour.source is not None:
            flavour.source.close()
        self.emit("pool removed", flavour=name, shells=len(flavour.shells))
        await self._give_back(flavour, report)

    # Taking

    def take(self, shape: Shape, key: ImageKey | None, pages: int) -> Shell | None:
        """A shell of just that shape and image, or None. It belongs to the caller now.

        ``pages`` is how many its device page must have beyond the first.
        """
        now = self._loop.time()
        self._quiet_from = now + QUIET
        shelf = self.shelves.get((shape, key))
        if not shelf:
            return None
        for _ in range(len(shelf)):
            shell = shelf.popleft()
            if shell.pages >= pages:
                flavour = shell.flavour
                assert flavour is not None
                flavour.shells.discard(shell)
                flavour.served += 1
                flavour.asked = now
                self._wake.set()
                return shell
            shelf.append(shell)
        return None

    @contextlib.contextmanager
    def attending(self) -> Iterator[None]:
        """Hold the refill back for a moment, while somebody waits for a create."""
        if not self._attended:
            self._attended_until = self._loop.time() + ATTENTION
        self._attended += 1
        try:
            yield
        finally:
            self._attended -= 1
            self._wake.set()

    def has_store(self, shape: Shape, key: ImageKey | None) -> bool:
        """Whether shells of that shape and image are of stock guests with a store."""
        shelf = self.shelves.get((shape, key))
        return bool(shelf and shelf[0].store)

    def put_back(self, shell: Shell) -> None:
        """Return a shell that nothing was done to; to its end if it is of no flavour any more."""
        flavour = shell.flavour
        if flavour is not None and self._has(flavour):
            self._put(shell, flavour)
        else:
            self.spawn(self.discard(shell))

    def _put(self, shell: Shell, flavour: Flavour) -> None:
        shell.flavour = flavour
        flavour.shells.add(shell)
        self.shelves.setdefault((shell.shape, shell.image), deque()).append(shell)
        self._changed()

    def _take_off(self, shell: Shell) -> None:
        """Take a shell off its shelf, for its end."""
        flavour = shell.flavour
        if flavour is not None:
            flavour.shells.discard(shell)
        shelf = self.shelves.get((shell.shape, shell.image))
        if shelf is not None:
            with contextlib.suppress(ValueError):
                shelf.remove(shell)
            if not shelf:
                del self.shelves[shell.shape, shell.image]

    def _retire(self, shell: Shell) -> None:
        """Give a shell on a shelf back, without waiting for its end."""
        self._take_off(shell)
        self.spawn(self.discard(shell))

    async def _give_back(self, flavour: Flavour, report: Report) -> int:
        """Give all shells of a flavour back, and wait for their end; how many there were."""
        shells = list(flavour.shells)
        for shell in shells:
            self._take_off(shell)
        ends = [self.discard(shell) for shell in shells]
        for done, end in enumerate(asyncio.as_completed(ends), 1):
            await end
            report(flavour.name, done, len(shells))
        return len(shells)

    async def filled(self, names: Sequence[str], report: Report = unreported) -> None:
        """Wait until flavours have all their shells. StateError if one cannot have them."""
        flavours = [self.flavour(name) for name in names]
        before = {flavour.name: flavour.ready for flavour in flavours}
        total = sum(flavour.size - flavour.ready for flavour in flavours)
        done = 0
        while any(flavour.ready < flavour.size for flavour in flavours):
            for flavour in flavours:
                if problem := self._hindrance(flavour):
                    raise StateError(f'flavour "{flavour.name}": {problem}')
            await self.change()
            for flavour in flavours:
                if not self._has(flavour):
                    raise StateError(f'the flavour "{flavour.name}" was removed meanwhile')
            for flavour in flavours:  # others may take some, or resize it
                while before[flavour.name] < flavour.ready and done < total:
                    before[flavour.name] += 1
                    done += 1
                    report(flavour.name, done, total)

    def uuids(self) -> set[str]:
        """Those of the shells on the shelves."""
        return {shell.uuid for flavour in self.flavours.values() for shell in flavour.shells}

    @property
    def directories(self) -> int:
        """How many shells have one in the registry, those that are being made included."""
        return sum(len(flavour.shells) for flavour in self.flavours.values()) + self._under_way

    def domids(self) -> set[int]:
        """Theirs as well."""
        return {shell.domid for flavour in self.flavours.values() for shell in flavour.shells}

    async def change(self) -> None:
        """Wait until a flavour has more shells, a problem, or no room for more."""
        waiter = self._loop.create_future()
        self._changes.append(waiter)
        await waiter

    def _changed(self) -> None:
        changes, self._changes = self._changes, []
        for waiter in changes:
            if not waiter.done():
                waiter.set_result(None)

    # Making

    async def make(
        self,
        config: DomainConfig,
        opened: Sequence[OpenImage],
        key: ImageKey | None,
        *,
        room: int = 0,
        urgent: bool = False,
        told: Callable[[str], None] | None = None,
    ) -> Shell:
        """A new shell of the configuration's shape, warm if images are given. ChaosError.

        ``told`` is called with the name of each step that is done.
        """
        worker = self._pick(urgent=urgent)
        shape = shape_of(config)
        uuid = str(uuid_module.uuid4())
        names = self.names
        macs: list[bytes] = []
        try:
            for _ in config.vifs:
                macs.append(names.reserve_mac(None, uuid))  # noqa: PERF401 - undone one by one
            names.add_shell(Record(uuid, "", state=SHELL, macs=[mac.hex(":") for mac in macs]))
        except BaseException:
            for mac in macs:
                names.release_mac(mac.hex(":"), uuid)
            raise
        shell = Shell(
            self.host, names, uuid, shape, macs, more_pages(len(macs) + len(config.disks), room)
        )
        shell.image = key
        self._under_way += 1
        request = {
            "do": "make",
            "uuid": uuid,
            "config": self._packed(config, shape),
            "macs": macs,
            "metadata_room": room,
        }
        try:
            fds = [each.fd for each in opened]
            made = await worker.ask(request, fds, urgent=urgent, told=told)
            self.deaths = 0
            shell.take_over(made)
        except BaseException:
            self._let_go(shell)
            await asyncio.shield(self._reap(uuid))
            raise
        finally:
            self._under_way -= 1
        if not opened:
            shell.worker = worker
        return shell

    def _packed(self, config: DomainConfig, shape: Shape) -> bytes:
        """What makers are told of a shell's configuration; what comes late is not in it."""
        key = (shape, config.kernel, config.ramdisk, config.cmdline)
        packed = self._told.get(key)
        if packed is None:
            packed = self._told[key] = msgpack.packb(blank(config, "shell").as_dict())
            if len(self._told) > TOLD_MAX:
                self._told.popitem(last=False)
        return packed

    async def order(
        self,
        config: DomainConfig,
        source: Source,
        opened: Sequence[OpenImage],
        *,
        room: int,
        told: Callable[[str], None] | None = None,
    ) -> Shell:
        """A warm shell made for one request, memory found for it if the pool has any."""
        cost = self._cost(config)
        needed = self._promised + cost
        short = self._free_mib() < needed
        self._seeking += short  # what is given back now is not for the refill
        self._promised += cost
        try:
            if short:
                await self._find_memory(needed)
            key = source.key_of(opened)
            return await self._finish(
                self.make(config, opened, key, room=room, urgent=True, told=told)
            )
        finally:
            self._seeking -= short
            self._promised -= cost
            self._wake.set()

    async def load(
        self,
        shell: Shell,
        config: DomainConfig,
        source: Source,
        opened: Sequence[OpenImage],
        told: Callable[[str], None] | None = None,
    ) -> Shell:
        """Load an image into a generic shell. On a failure the shell is gone. ChaosError."""
        return await self._finish(self._load(shell, config, source, opened, told))

    async def _load(
        self,
        shell: Shell,
        config: DomainConfig,
        source: Source,
        opened: Sequence[OpenImage],
        told: Callable[[str], None] | None,
    ) -> Shell:
        shell.spend(unawaited=True)
        try:
            worker = self._maker_of(shell)
            request = {
                "do": "load",
                "uuid": shell.uuid,
                "config": self._packed(config, shell.shape),
            }
            fds = [each.fd for each in opened]
            made = await worker.ask(request, fds, urgent=True, told=told)
            self.deaths = 0
            shell.image = source.key_of(opened)
            shell.flavour = None  # it is not of its kind any more
            shell.take_over(made)
        except BaseException:
            self._let_go(shell)
            await asyncio.shield(self._reap(shell.uuid))
            raise
        return shell

    def _maker_of(self, shell: Shell) -> Worker:
        worker, shell.worker = shell.worker, None
        if worker is None or worker not in self.workers:
            raise XenError("the shell's maker is gone", hint="try again")
        return worker

    async def _finish(self, work: Awaitable[Shell]) -> Shell:
        """Wait for a shell; if nobody waits any more it is made all the same, and given back."""
        task = self._begin(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._unwanted)
            raise

    def _unwanted(self, task: asyncio.Task[Shell]) -> None:
        if not task.cancelled() and task.exception() is None:
            self.spawn(self.discard(task.result()))

    def _pick(self, *, urgent: bool) -> Worker:
        ready = [worker for worker in self.workers if worker.ready] or self.workers
        if not ready:
            raise XenError("no shell maker runs: they keep dying", hint="see the daemon's log")
        if urgent:
            return min(ready, key=lambda worker: len(worker.jobs) + (worker.job is not None))
        return next((worker for worker in ready if worker.idle), ready[0])

    async def discard(self, shell: Shell) -> None:
        """The end of a shell that is on no shelf."""
        self._ending += 1
        try:
            self._let_go(shell)
            worker, shell.worker = shell.worker, None
            if worker is not None and worker in self.workers:
                with contextlib.suppress(ChaosError):
                    await worker.ask({"do": "drop", "uuid": shell.uuid})
            await self._reap(shell.uuid)
        finally:
            self._ending -= 1

    def _let_go(self, shell: Shell) -> None:
        try:
            shell.let_go()
        except ChaosError as error:  # its domain shall go all the same
            self._tell("a shell is not let go of", error)

    async def _reap(self, uuid: str) -> None:
        """Remove what there is of a shell, wherever its making stopped."""
        try:
            await self.in_thread(lambda host, names: reap_one(host, names, uuid, shells=True))
        except (ChaosError, OSError) as error:
            self.emit("problem", what=f"a shell cannot be removed: {error}", uuid=uuid)

    # Refilling

    def note(self, config: DomainConfig, source: Source, opened: Sequence[OpenImage]) -> None:
        """A request that no warm shell served: asked often, its shape gets shells of its own."""
        key = (shape_of(config), source.key_of(opened))
        devices, room = len(config.vifs) + len(config.disks), len(config.metadata)
        now = self._loop.time()
        times = self._asked.setdefault(key, deque(maxlen=ASKED_OFTEN))
        self._asked.move_to_end(key)
        times.append(now)
        while len(self._asked) > ASKED_MAX:
            self._asked.popitem(last=False)
        adaptive = [flavour for flavour in self.flavours.values() if flavour.adaptive]
        if (
            not self.settings.adaptive
            or not key[0].poolable
            or len(times) < ASKED_OFTEN
            or now - times[0] > ASKED_WITHIN
            or len(adaptive) >= ADAPTIVE_MAX
            or any(
                (flavour.shape, flavour.source and flavour.source.key()) == key
                and more_pages(devices, flavour.room) >= more_pages(devices, room)
                for flavour in self.flavours.values()
            )
        ):
            return
        del self._asked[key]
        name = ""
        while not name or name in self.flavours:
            self._counter += 1
            name = f"{ADAPTIVE}{self._counter}"
        held = source.holding(opened)
        self._add(
            Flavour(
                name,
                blank(config, name),
                self.settings.adaptive_size,
                0,
                room,
                key[0],
                held,
                adaptive=True,
            )
        )

    async def _refill(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._make_what_is_missing()
                self._problems.pop(NOT_REFILLED, None)
            except Exception as error:  # noqa: BLE001 - the next tick may have better luck
                self._tell(NOT_REFILLED, error)

    async def _make_what_is_missing(self) -> None:
        while any(worker.idle for worker in self.workers):
            flavour = self._neediest()
            if flavour is None:
                break
            wait = self._quiet_from - self._loop.time()
            if flavour.urgent:
                wait = self._attended_until - self._loop.time() if self._attended else 0.0
            if wait > 0:
                self._loop.call_later(wait, self._wake.set)
                break
            if self._seeking:
                break
            flavour.making += 1
            self.spawn(self._fill(flavour))
            await asyncio.sleep(0)  # the maker is asked before the next one is chosen

    def _neediest(self) -> Flavour | None:
        """The flavour that lacks most; one that there is no room for holds up no other."""
        now = self._loop.time()
        wanting = [
            flavour
            for flavour in self.flavours.values()
            if flavour.missing > 0 and flavour.not_before <= now
        ]
        if not wanting:
            return None
        allowed, free = self._room()
        return min(
            (f for f in wanting if f.config.memory <= allowed and self._cost(f.config) <= free),
            key=lambda f: (not f.urgent, (len(f.shells) + f.making) / f.size),
            default=None,
        )

    def _room(self) -> tuple[int, int]:
        """MiB that one more shell may have, and may cost; negative if there may be none."""
        held = [(len(f.shells) + f.making, f.config.memory) for f in self.flavours.values()]
        if sum(count for count, _ in held) >= self.settings.max_shells:
            return -1, -1
        allowed = self.settings.max_memory - sum(count * mib for count, mib in held)
        return allowed, self._free_mib() - self.settings.memory_floor - self._promised

    def _lacks(self, flavours: Iterable[Flavour]) -> dict[Flavour, str]:
        """Those that miss shells for which there is no room, and why.

        What is under way may still make room: shells that are being given back, or that are being
        made and may yet fail.
        """
        wanting = [flavour for flavour in flavours if flavour.missing > 0]
        if not wanting:
            return {}
        limits, every = self.settings, self.flavours.values()
        full = sum(len(f.shells) for f in every) >= limits.max_shells
        allowed = limits.max_memory - sum(len(f.shells) * f.config.memory for f in every)
        free = self._free_mib()
        making = sum(f.making * self._cost(f.config) for f in every if f.making)
        lacks = {}
        for flavour in wanting:
            cost = self._cost(flavour.config)
            if full:
                lacks[flavour] = f"no room: max_shells of chaos.toml is {limits.max_shells}"
            elif flavour.config.memory > allowed:
                lacks[flavour] = (
                    f"no room for {flavour.config.memory} MiB more:"
                    f" max_memory of chaos.toml is {limits.max_memory} MiB"
                )
            elif cost > free + making - limits.memory_floor and not self._ending:
                lacks[flavour] = (
                    f"no room for {cost} MiB more: Xen has {free} MiB free,"
                    f" and memory_floor of chaos.toml is {limits.memory_floor} MiB"
                )
        return lacks

    def _notice_lacks(self) -> None:
        """Say which flavours there is no room for, where that was so at the last look too."""
        lacks = self._lacks(self.flavours.values())
        for flavour in self.flavours.values():
            flavour.lack = lacks.get(flavour, "") if flavour in self._lacking else ""
        self._lacking = lacks
        if any(flavour.lack for flavour in lacks):
            self._changed()

    def _hindrance(self, flavour: Flavour) -> str:
        """Why a flavour does not get the shells that it misses, "" if nothing is known of that."""
        if flavour.problem or not flavour.lack:
            return flavour.problem
        return self._lacks([flavour]).get(flavour, "")

    async def _fill(self, flavour: Flavour) -> None:
        opened: list[OpenImage] = []
        digest = b""
        try:
            key = None
            if flavour.source is not None:
                opened = flavour.source.open()
                key = flavour.source.key_of(opened)
                digest = await self._digest(flavour, key, opened)
            shell = await self.make(flavour.config, opened, key, room=flavour.room)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next try comes later
            flavour.failures += 1
            delay = DELAYS[min(flavour.failures, len(DELAYS) - 1)]
            flavour.not_before = self._loop.time() + delay
            problem = str(error)
            if problem != flavour.problem and self._has(flavour):
                self.emit("problem", what=problem, flavour=flavour.name)
            flavour.problem = problem
            self._changed()
            self._loop.call_later(delay, self._wake.set)
        else:
            flavour.failures, flavour.problem = 0, ""
            flavour.made += 1
            shell.digest = digest
            shell.spend(unawaited=True)
            if self._has(flavour):
                self._put(shell, flavour)
            else:
                self.spawn(self.discard(shell))
        finally:
            flavour.making -= 1
            self._shrink(flavour)  # it may have been resized meanwhile
            for each in opened:
                each.close()
            self._wake.set()

    async def _digest(
        self, flavour: Flavour, key: ImageKey, opened: Sequence[OpenImage], *, again: bool = False
    ) -> bytes:
        """The images' digest; read ``again``, or if the one that is known may be of other contents.

        Shells of other contents under the same key go.
        """
        if again or flavour.digested != key:
            start = self._loop.time()
            digest = await self.in_thread(lambda _host, _names: image.digest(opened))
            took = self._loop.time() - start
            flavour.verify_at = start + max(DIGEST_SECONDS, took / DIGEST_SHARE)
            flavour.digest = digest
            flavour.digested = None if any(each.just_written() for each in opened) else key
            self._drain(flavour, lambda shell: shell.image == key and shell.digest != digest)
        return flavour.digest

    async def _verify(self, flavour: Flavour) -> None:
        """Read a flavour's image again: a file can change without a word of that in its times."""
        if flavour.source is None:
            return
        try:
            opened = flavour.source.open()
        except ChaosError:
            return  # the next refill tells of that
        try:
            await self._digest(flavour, flavour.source.key_of(opened), opened, again=True)
        finally:
            for each in opened:
                each.close()

    def _drain(self, flavour: Flavour, stale: Callable[[Shell], bool]) -> None:
        """Give back the shells of a flavour that are ``stale``."""
        shells = [shell for shell in flavour.shells if stale(shell)]
        for shell in shells:
            self._retire(shell)
        if shells:
            self.emit("pool drained", flavour=flavour.name, shells=len(shells))

    # Memory

    def _free_mib(self) -> int:
        return int(self.host.ctrl.physinfo().free_pages >> 8)

    def _cost(self, config: DomainConfig) -> int:
        """MiB that the hypervisor takes for a domain, its page tables for a PVH guest included."""
        mib = config.memory + OVERHEAD_MIB
        if config.type == "pvh":
            hap = "hap" in self.host.virt_caps
            mib += -(-pvh.paging_bytes(config, hap=hap) >> MIB_SHIFT)
        return mib

    async def _find_memory(self, mib: int) -> None:
        """Give shells back until so much is free, if all of them are enough for that."""
        held = sum(
            (len(flavour.shells) + flavour.making) * self._cost(flavour.config)
            for flavour in self.flavours.values()
        )
        if self._free_mib() + held < mib:
            return
        while self._free_mib() < mib:
            shell = next(self._dispensable(), None)
            if shell is not None:
                self._take_off(shell)
                await self.discard(shell)
            elif any(flavour.making for flavour in self.flavours.values()):
                await self.change()
            else:
                return

    def _dispensable(self) -> Iterator[Shell]:
        """Shells, those that are missed least first."""
        flavours = sorted(self.flavours.values(), key=lambda f: (not f.adaptive, f.asked))
        for flavour in flavours:
            yield from list(flavour.shells)

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                await self._look_after_all()
                self._problems.pop(NOT_TIDIED, None)
            except Exception as error:  # noqa: BLE001 - the next tick may have better luck
                self._tell(NOT_TIDIED, error)
            self._wake.set()

    async def _look_after_all(self) -> None:
        for flavour in list(self.flavours.values()):
            self._look_after(flavour)
        self._notice_lacks()
        if self._free_mib() < self.settings.memory_floor:
            shell = next(self._dispensable(), None)
            if shell is not None:
                self._take_off(shell)
                self.emit("pool shrinks", why="memory is short", flavour=_name(shell))
                await self.discard(shell)

    def _look_after(self, flavour: Flavour) -> None:
        """Shells whose image changed on disk go, and adaptive flavours that nobody asks for."""
        if flavour.source is not None:
            key = flavour.source.key()
            self._drain(flavour, lambda shell: shell.image != key)
            if flavour.shells and flavour.verify_at <= self._loop.time():
                flavour.verify_at = self._loop.time() + DIGEST_SECONDS
                self.spawn(self._verify(flavour))
            if flavour.adaptive and flavour.source.changed():
                self.spawn(self.remove(flavour.name))
                return
        if flavour.adaptive and not flavour.making:
            idle = self._loop.time() - flavour.asked
            if idle > self.settings.adaptive_seconds:
                self.spawn(self.remove(flavour.name))


def _reap_shells(host: Host, names: Registry) -> None:
    reap(host, names, host.ctrl.domain_list(), [], shells=True)


def _name(shell: Shell) -> str:
    return shell.flavour.name if shell.flavour is not None else ""
