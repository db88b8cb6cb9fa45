"""The pool's bookkeeping, with makers that make domains on paper."""

from __future__ import annotations

import asyncio
import errno
import math
import mmap
import os
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgpack
import pytest
from paper_xen import Xen

from chaos import disk, image, store
from chaos.daemon import pool as module
from chaos.daemon.core import Daemon, counted
from chaos.daemon.flavour import Flavour, Source
from chaos.daemon.pool import OVERHEAD_MIB, Pool
from chaos.daemon.rights import Peer
from chaos.daemon.settings import FLAVOURS_MAX, FlavourSpec, Settings
from chaos.daemon.wanted import want
from chaos.daemon.workers import DELAYS, MakerDied
from chaos.diskspec import parse_disk
from chaos.domconfig import DomainConfig
from chaos.registry import RUNNING, Record, Registry
from chaos.shape import shape_of
from chaos.steps import Step
from chaos.verbs import pause
from chaos.vifspec import parse_vif
from noxs import blockdev, hotplug
from xenctypes.errors import (
    CallFailed,
    ChaosError,
    DeviceError,
    ImageError,
    StateError,
    StepError,
    XenError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

PATIENCE = 10.0
VIF = parse_vif("bridge=br", 0)[0]


class Maker:
    """Makes domains as chaos.daemon.maker does, at once, or dies of it."""

    deadly = False

    def __init__(self, xen: Xen, ended: Callable[[Maker], None]) -> None:
        self.xen = xen
        self.ended = ended
        self.ready = True
        self.job = None
        self.jobs: list[Any] = []
        self.pid = 1
        self.asked: list[dict[str, Any]] = []

    @property
    def idle(self) -> bool:
        return self.ready

    def ask(self, request: dict[str, Any], *_: Any, **more: Any) -> asyncio.Future[Any]:
        self.asked.append(request)
        if told := more.get("told"):
            for step in ("create domain", "load"):
                told(step)
        future = asyncio.get_running_loop().create_future()
        if self.deadly:
            self.ready = False
            self.ended(self)
            future.set_exception(MakerDied("a shell maker failed: it died"))
            return future
        if request["do"] == "make":
            config = msgpack.unpackb(request["config"])
            domid = self.xen.create(request["uuid"], mib=config["memory"])
        else:
            domid = next(
                d.domid
                for d in self.xen.domains.values()
                if str(d.uuid.hex()) in request["uuid"].replace("-", "")
            )
        warm = request["do"] == "load"
        future.set_result(
            {
                "domid": domid, "console_port": 1, "store_port": 2, "console_frame": 3,
                "store_frame": 4 if warm else -1, "noxs": False, "page": b"",
                "page_frames": [], "timings": [], "store": "", "disks": [],
            }
        )  # fmt: skip
        return future

    def end(self, _why: str) -> None:
        self.ready = False


class Lab:
    """A pool on a hypervisor of paper."""

    def __init__(self, names: Registry, settings: Settings) -> None:
        self.xen = Xen()
        self.names = names
        self.told: list[tuple[str, dict[str, Any]]] = []
        none: Any = None
        self.pool = Pool(self.xen.host, names, settings, self.in_thread, self.emit, none)

    async def in_thread(self, function: Callable[[Any, Registry], Any]) -> Any:
        return function(self.xen.host, self.names)

    def emit(self, kind: str, **data: Any) -> None:
        self.told.append((kind, data))

    def traces(self) -> list[str]:
        """What the registry has."""
        return [
            name
            for kind in ("domains", "macs", "names")
            for name in os.listdir(f"{self.names.path}/{kind}")
        ]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    names = Registry(str(tmp_path / "run"))
    names.prepare()

    def go(test: Callable[[Lab], Awaitable[None]], *, makers: int = 1, **settings: Any) -> None:
        async def main() -> None:
            lab = Lab(names, Settings(builders=makers, **settings))
            monkeypatch.setattr(module, "Worker", lambda _path, ended, _idle: Maker(lab.xen, ended))
            lab.pool.start()
            async with asyncio.timeout(PATIENCE):
                await test(lab)
                await lab.pool.close()
            assert lab.xen.domains == {}
            assert lab.traces() == []

        monkeypatch.setattr(module, "TICK", 0.01)
        monkeypatch.setattr(module, "QUIET", 0.0)
        asyncio.run(main())

    return go


def config(memory: int = 4, **more: Any) -> DomainConfig:
    return DomainConfig(name="x", memory=memory, kernel="k", **more)


def spec(name: str = "f", size: int = 2, memory: int = 4) -> FlavourSpec:
    return FlavourSpec(name=name, config=DomainConfig(name=name, memory=memory), size=size)


async def until(true: Callable[[], Any]) -> None:
    """Let the loop turn until something is so."""
    loop = asyncio.get_running_loop()
    while not true():
        turned = loop.create_future()
        loop.call_soon(turned.set_result, None)
        await turned


async def filled(pool: Pool) -> None:
    flavours = pool.flavours.values()
    await until(lambda: all(flavour.missing <= 0 and not flavour.making for flavour in flavours))


def test_makers_are_told_what_is_fixed_and_nothing_of_the_guest(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        base = config(vifs=(VIF,))
        other = replace(base, name="y", uuid=b"0123456789abcdef", on_crash="restart", metadata=b"z")
        changed = ({"cmdline": "quiet"}, {"vcpus": 2, "maxvcpus": 2})
        for each in (base, other, *(replace(base, **change) for change in changed)):
            await lab.pool.make(each, [], None)
        makers: Any = lab.pool.workers
        told = [msgpack.unpackb(each["config"]) for maker in makers for each in maker.asked]
        assert told[0] == told[1]
        assert (told[1]["uuid"], told[1]["noxs_metadata"]) == (None, "")
        assert told[2:] == [told[0] | change for change in changed]

    run(test)


def test_without_a_maker_nothing_is_left_of_a_create(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        lab.pool.workers.clear()
        with pytest.raises(XenError, match="no shell maker runs"):
            await lab.pool.make(config(vifs=(VIF,)), [], None)
        assert lab.traces() == []

    run(test)


def test_directories_are_counted_from_when_they_are_there(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, seen = Maker.ask, []

    async def test(lab: Lab) -> None:
        def counted(maker: Maker, request: dict[str, Any], *args: Any, **more: Any) -> Any:
            if request["do"] == "make":
                seen.append((lab.pool.directories, len(os.listdir(f"{lab.names.path}/domains"))))
            return ask(maker, request, *args, **more)

        monkeypatch.setattr(Maker, "ask", counted)
        lab.pool.add(spec(size=3))
        await filled(lab.pool)
        assert seen == [(1, 1), (2, 2), (3, 3)]
        assert lab.pool.directories == 3
        monkeypatch.setattr(Maker, "deadly", True)
        with pytest.raises(MakerDied):
            await lab.pool.make(config(), [], None)
        assert lab.pool.directories == 0  # those of the maker that died went with it

    run(test)


def test_shells_that_are_made_while_their_flavour_shrinks_are_given_back(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Maker.ask

    async def test(lab: Lab) -> None:
        def late(maker: Maker, request: dict[str, Any], *args: Any, **more: Any) -> Any:
            if request["do"] == "make":
                lab.pool.resize("f", 0)
            return ask(maker, request, *args, **more)

        monkeypatch.setattr(Maker, "ask", late)
        flavour = lab.pool.add(spec(size=2))
        await until(lambda: flavour.made)
        await until(lambda: lab.xen.domains == {})
        assert (flavour.shells, flavour.making, flavour.missing) == (set(), 0, 0)

    run(test)


def test_addresses_that_cannot_be_had_are_given_back(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        reserve, given = lab.names.reserve_mac, []

        def reserve_mac(mac: bytes | None, uuid: str) -> bytes:
            if given:
                raise StateError("no free MAC address found")
            given.append(reserve(mac, uuid))
            return given[0]

        lab.names.reserve_mac = reserve_mac  # type: ignore[method-assign, assignment]
        with pytest.raises(StateError, match="no free MAC"):
            await lab.pool.make(config(vifs=(VIF, parse_vif("bridge=br", 1)[0])), [], None)
        assert given
        assert lab.traces() == []

    run(test)


def test_makers_that_die_in_each_job_are_replaced_later_and_later(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(lab: Lab) -> None:
        pool = lab.pool
        monkeypatch.setattr(Maker, "deadly", True)
        for _ in range(4):
            if not pool.workers:
                pool._hire()  # instead of waiting so long
            pool._wake.set()  # as a new one that is ready does
            with pytest.raises(MakerDied):
                await pool.make(config(), [], None)
        delays = [data["replaced_in_s"] for kind, data in lab.told if kind == "maker died"]
        assert delays == list(DELAYS[:4])
        monkeypatch.setattr(Maker, "deadly", False)
        if not pool.workers:
            pool._hire()
        await pool.discard(await pool.make(config(), [], None))
        assert pool.deaths == 0

    run(test)


def test_what_can_never_fit_costs_no_shells(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        pool = lab.pool
        pool.add(spec(size=3, memory=100))
        await filled(pool)
        free = lab.xen.free_mib
        await pool._find_memory(free + 3 * 102 + 1)
        assert len(lab.xen.domains) == 3
        pool.flavour("f").size = 1  # or it is refilled
        await pool._find_memory(free + 102)
        assert len(lab.xen.domains) == 1

    run(test)


def test_creates_at_once_do_not_count_on_the_same_memory(
    run: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "k").write_bytes(b"image")

    async def test(lab: Lab) -> None:
        pool = lab.pool
        pool.add(spec(size=4, memory=200))
        await filled(pool)
        pool.flavour("f").size = 0  # or it is refilled
        asked = want(config(memory=150))
        asked.source.kernel = str(tmp_path / "k")
        (opened,) = asked.source.open()
        assert 150 < lab.xen.free_mib < 300
        shells = await asyncio.gather(
            *(pool.order(asked.config, asked.source, [opened], room=0) for _ in range(3))
        )
        opened.close()
        assert lab.xen.free_mib >= 0
        assert 0 < len(pool.flavour("f").shells) < 4
        assert pool._promised == 0
        for shell in shells:
            await pool.discard(shell)

    run(test)


def test_page_tables_are_memory_too(run: Callable[..., None], tmp_path: Path) -> None:
    """What Xen takes for those of a PVH guest is found, and kept free, like the guest's own."""
    (tmp_path / "k").write_bytes(b"image")

    async def test(lab: Lab) -> None:
        pool = lab.pool
        pool.add(spec(size=1, memory=900))
        await filled(pool)
        pool.flavour("f").size = 0  # or it is refilled
        asked = want(config(memory=64, type="pvh", vcpus=64))  # 1 MiB for each vCPU
        asked.source.kernel = str(tmp_path / "k")
        assert asked.config.memory + OVERHEAD_MIB < lab.xen.free_mib < 128
        (opened,) = asked.source.open()
        shell = await pool.order(asked.config, asked.source, [opened], room=0)
        opened.close()
        assert len(lab.xen.domains) == 1
        await pool.discard(shell)
        lab.xen.free_mib = 64 + 100
        assert pool._room()[1] == 100 < pool._cost(asked.config)

    run(test)


@pytest.mark.parametrize(
    ("bound", "shells"),
    [
        ({"max_shells": 4}, [2, 2]),
        ({"max_memory": 21}, [3, 1]),  # in which there is no room for the one of 8 MiB at last
        ({"max_memory": 6}, [1, 0]),
        ({"max_shells": 0}, [0, 0]),
        ({"memory_floor": 1024 - 9 - OVERHEAD_MIB}, [2, 0]),
    ],
)
def test_the_pool_is_bounded_and_a_create_is_not(
    run: Callable[..., None], tmp_path: Path, bound: dict[str, int], shells: list[int]
) -> None:
    (tmp_path / "k").write_bytes(b"image")

    async def test(lab: Lab) -> None:
        pool, calls = lab.pool, lab.xen.calls
        flavours = [pool.add(spec("small", size=3)), pool.add(spec("big", size=3, memory=8))]

        async def settle() -> None:
            ticks = calls["physinfo"] + 20
            counts = []

            def settled() -> bool:
                counts.append(len(lab.xen.domains))
                return calls["physinfo"] >= ticks and len(pool._tasks) == len(pool._loops)

            await until(settled)
            assert max(counts) == counts[-1] == sum(shells)
            assert [len(flavour.shells) for flavour in flavours] == shells

        await settle()
        asked = want(config(memory=100))
        asked.source.kernel = str(tmp_path / "k")
        (opened,) = asked.source.open()
        shell = await pool.order(asked.config, asked.source, [opened], room=0)
        opened.close()
        if "memory_floor" not in bound:  # below it the next look gives a shell back
            assert len(lab.xen.domains) == sum(shells) + 1
        await pool.discard(shell)
        for flavour in flavours:  # what is taken is made up for
            taken = pool.take(flavour.shape, None, 0)
            if taken is not None:
                await pool.discard(taken)
        await settle()
        assert "problem" not in [kind for kind, _ in lab.told]

    run(test, **bound)


def test_what_takes_long_reports_progress(run: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "k").write_bytes(b"image")
    seen: list[tuple[str, int, int]] = []

    def report(*what: Any) -> None:
        seen.append(what)

    async def test(lab: Lab) -> None:
        pool = lab.pool
        pool.add(spec("f", size=3))
        await pool.filled(["f"], report)
        assert seen == [("f", 1, 3), ("f", 2, 3), ("f", 3, 3)]
        await pool.filled(["f"], report)
        assert len(seen) == 3
        seen.clear()
        assert await pool.drain("f", report) == 3
        assert seen == [("f", 1, 3), ("f", 2, 3), ("f", 3, 3)]
        await pool.filled(["f"])
        seen.clear()
        # A cold create, for which the pool is no help.
        asked = want(config(memory=9))
        asked.source.kernel = str(tmp_path / "k")
        told = counted(report, 2)
        (opened,) = asked.source.open()
        shell = await pool.order(asked.config, asked.source, [opened], room=0, told=told)
        opened.close()
        await pool.discard(shell)
        assert seen == [("create domain", 1, 2), ("load", 2, 2)]
        # Whoever waits for what will not come learns of it.
        waiting = asyncio.ensure_future(pool.filled(["f"]))
        pool.resize("f", 4)
        await waiting
        pool.flavour("f").problem = "no room"
        waiting = asyncio.ensure_future(pool.filled(["f"]))
        pool.flavour("f").size = 5
        with pytest.raises(StateError, match="no room"):
            await waiting
        pool.flavour("f").problem = ""
        pool.flavour("f").not_before = math.inf
        pool.flavour("f").size = 6
        waiting = asyncio.ensure_future(pool.filled(["f"]))
        await until(lambda: pool._changes)
        seen.clear()
        await pool.remove("f", report)
        with pytest.raises(StateError, match="removed meanwhile"):
            await waiting
        assert seen[-1][1:] == (len(seen), len(seen))

    run(test)


@pytest.mark.parametrize(
    ("bound", "had", "why"),
    [
        ({"max_shells": 2}, 2, "no room: max_shells of chaos.toml is 2"),
        ({"max_memory": 10}, 2, "no room for 4 MiB more: max_memory of chaos.toml is 10 MiB"),
        (
            {"memory_floor": 1024 - 8 - OVERHEAD_MIB},
            2,
            "no room for 6 MiB more: Xen has 1016 MiB free, and memory_floor of chaos.toml is 1014",
        ),
        ({"max_memory": 3}, 0, "no room for 4 MiB more: max_memory of chaos.toml is 3 MiB"),
    ],
)
def test_a_flavour_that_there_is_no_room_for_says_so(
    run: Callable[..., None], bound: dict[str, int], had: int, why: str
) -> None:
    async def test(lab: Lab) -> None:
        pool = lab.pool
        flavour = pool.add(spec(size=4))
        with pytest.raises(StateError, match=why):
            await pool.filled(["f"])
        assert len(flavour.shells) == had
        assert flavour.describe()["problem"].startswith(why)
        with pytest.raises(StateError, match=why):
            await pool.filled(["f"])
        # One that holds up no other, and that goes when there is room.
        pool.settings = Settings()
        await pool.filled(["f"])
        await until(lambda: flavour.describe()["problem"] is None)
        assert "problem" not in [kind for kind, _ in lab.told]

    run(test, **bound)


def test_what_is_given_back_or_made_makes_room_soon(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no room for two ticks and more, and nobody is told that there is none."""

    async def ticks(lab: Lab) -> None:
        asked = lab.xen.calls["physinfo"] + 20
        await until(lambda: lab.xen.calls["physinfo"] >= asked)

    async def test(lab: Lab) -> None:
        pool, loop = lab.pool, asyncio.get_running_loop()
        flavour = pool.add(spec(size=2, memory=400))
        await pool.filled(["f"])
        reaped, in_thread = loop.create_future(), pool.in_thread

        async def late(function: Any) -> Any:
            await reaped
            return await in_thread(function)

        monkeypatch.setattr(pool, "in_thread", late)
        drained = asyncio.ensure_future(pool.drain("f"))
        await until(lambda: not flavour.shells)
        waiting = asyncio.ensure_future(pool.filled(["f"]))
        await ticks(lab)
        assert (flavour.making, flavour.lack, waiting.done()) == (0, "", False)
        reaped.set_result(None)
        await asyncio.gather(drained, waiting)

        # One that is made, but that nobody wants any more, and that goes when it is done.
        ask, made = Maker.ask, loop.create_future()

        async def slowly(*args: Any, **more: Any) -> Any:
            await made
            return await ask(*args, **more)

        monkeypatch.setattr(Maker, "ask", slowly)
        pool.settings = Settings(max_memory=1000, memory_floor=0)
        other = pool.add(spec("other", size=1, memory=200))
        await until(lambda: other.making)
        pool.resize("other", 0)
        pool.add(spec("third", size=1, memory=200))
        waiting = asyncio.ensure_future(pool.filled(["third"]))
        await ticks(lab)
        assert (pool.flavour("third").lack, waiting.done()) == ("", False)
        made.set_result(None)
        await waiting

    run(test)


def adaptive(pool: Pool, asked: Any) -> Flavour:
    """The flavour that a configuration gets when it is asked for often."""
    for _ in range(3):
        opened = asked.source.open()
        pool.note(asked.config, asked.source, opened)
        for each in opened:
            each.close()
    (flavour,) = (flavour for flavour in pool.flavours.values() if flavour.adaptive)
    return flavour


def test_an_adaptive_flavour_has_room_for_the_metadata_that_was_asked_for(
    run: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "k").write_bytes(b"image")

    async def test(lab: Lab) -> None:
        plain, rich = want(config()), want(replace(config(), metadata=bytes(8192)))
        for asked in (plain, rich):
            asked.source.kernel = str(tmp_path / "k")
        assert rich.pages > plain.pages
        adaptive(lab.pool, plain)
        for asked in (rich, plain, rich):  # what has more room does for both
            for _ in range(3):
                with asked.source.open()[0] as opened:
                    lab.pool.note(asked.config, asked.source, [opened])
        assert [flavour.room for flavour in lab.pool.flavours.values()] == [0, 8192]

    run(test)


def test_a_flavour_that_is_removed_opens_nothing(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its paths are a client's, and the daemon's rights are root's."""
    (tmp_path / "k").write_bytes(b"image")
    paths: list[str] = []

    async def test(lab: Lab) -> None:
        pool = lab.pool
        asked = want(config())
        asked.source.kernel = str(tmp_path / "k")
        flavour = adaptive(pool, asked)
        assert flavour.source is not None
        monkeypatch.setattr(image, "open_image", paths.append)
        flavour.making += 1
        begun = [pool.spawn(pool._fill(flavour)), pool.spawn(pool._verify(flavour))]
        await pool.remove(flavour.name)
        await asyncio.gather(*begun)
        with pytest.raises(ImageError, match="of a flavour that was removed"):
            flavour.source.open()
        assert paths == []
        assert "problem" not in [kind for kind, _ in lab.told]

    run(test)


def test_images_are_held_all_or_none(tmp_path: Path) -> None:
    ramdisk = tmp_path / "r"
    for path in (tmp_path / "k", ramdisk):
        path.write_bytes(b"image")
    source = Source(str(tmp_path / "k"), str(ramdisk), "")
    opened = source.open()
    held = source.holding(opened)
    assert not held.changed()
    os.truncate(ramdisk, 0)
    assert held.changed()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ImageError, match="is empty"):
        held.open()
    with pytest.raises(ImageError, match="is empty"):
        source.holding(opened)
    assert os.listdir("/proc/self/fd") == before
    held.close()
    for each in opened:
        each.close()


def test_an_adaptive_flavour_goes_when_its_ramdisk_changes(
    run: Callable[..., None], tmp_path: Path
) -> None:
    for name in ("k", "r"):
        (tmp_path / name).write_bytes(b"image")

    async def test(lab: Lab) -> None:
        asked = want(config())
        asked.source.kernel, asked.source.ramdisk = str(tmp_path / "k"), str(tmp_path / "r")
        flavour = adaptive(lab.pool, asked)
        await filled(lab.pool)
        os.truncate(tmp_path / "r", 0)
        await until(lambda: flavour.name not in lab.pool.flavours)

    run(test)


def test_flavours_are_bounded_and_keep_their_names(
    run: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "k").write_bytes(b"image")

    async def test(lab: Lab) -> None:
        pool = lab.pool
        mine = pool.add(spec("adaptive-1", size=0))
        asked = want(config())
        asked.source.kernel = str(tmp_path / "k")
        for _ in range(3):
            opened = asked.source.open()
            pool.note(asked.config, asked.source, opened)
            for each in opened:
                each.close()
        assert pool.flavours["adaptive-1"] is mine
        assert pool.flavours["adaptive-2"].adaptive
        await pool.remove("adaptive-2")
        for number in range(FLAVOURS_MAX - 1):
            pool.add(spec(f"f{number}", size=0))
        with pytest.raises(StateError, match="256 flavours already"):
            pool.add(spec("one more", size=0))

    run(test)


@pytest.mark.parametrize("failing", ["physinfo", "unbind"])
def test_a_failed_call_does_not_end_the_pool_s_work(failing: str, run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        pool, xen = lab.pool, lab.xen
        xen.failing[failing] = CallFailed(failing, errno.EAGAIN)
        pool.add(spec())
        if failing == "unbind":
            await filled(pool)
            for shell in pool.flavour("f").shells:
                shell.port = xen.bind_interdomain(shell.domid, 1)
            assert await pool.drain("f") == 2
        often = 2 if failing == "unbind" else 6
        await until(lambda: xen.calls[failing] >= often)
        told = [data["what"] for kind, data in lab.told if kind == "problem"]
        assert told
        assert len(set(told)) == len(told)  # not again with each tick
        xen.failing.clear()
        await filled(pool)
        assert len(xen.domains) == 2

    run(test)


class Delivering:
    """As much of a Daemon as a delivery needs."""

    create = Daemon.create
    _deliver = Daemon._deliver
    _is_as_before = Daemon._is_as_before

    def __init__(self, lab: Lab) -> None:
        self.pool = lab.pool
        self.names = lab.names
        self._dom0_macs = frozenset({"00:16:3e:00:00:01"})
        self.guests = SimpleNamespace(info=lambda domid, _uuid: lab.xen.domain_info(domid))

    def refuse(self, shell: Any, asked: DomainConfig) -> None:
        peer = Peer(1, 0, 0, ())
        with pytest.raises(ChaosError):
            Daemon._deliver(self, shell, want(asked), peer, paused=False)  # type: ignore[arg-type]


def test_only_a_shell_that_is_as_before_returns_to_its_shelf(run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        pool, xen, daemon = lab.pool, lab.xen, Delivering(lab)
        flavour = pool.add(spec(size=1))
        await filled(pool)
        flavour.size = 0  # no more are made
        (shell,) = flavour.shells
        lab.names.link_name("taken", shell.uuid.replace(shell.uuid[:4], "0000"))
        os.mkdir(f"{lab.names.path}/domains/{shell.uuid.replace(shell.uuid[:4], '0000')}")
        assert pool.take(shell.shape, None, 0) is shell
        shell.noxs = True
        daemon.refuse(shell, DomainConfig(name="taken", memory=4, kernel="k"))
        assert flavour.shells == {shell}
        # Somebody let it run.
        xen.domain_unpause(shell.domid)
        assert pool.take(shell.shape, None, 0) is shell
        daemon.refuse(shell, DomainConfig(name="other", memory=4, kernel="k"))
        assert flavour.shells == set()
        await until(lambda: not xen.domains)
        os.rmdir(f"{lab.names.path}/domains/{shell.uuid.replace(shell.uuid[:4], '0000')}")
        with lab.names.locked():
            lab.names.sweep()

    run(test)


def test_a_generic_shell_with_an_image_is_of_its_flavour_no_more(
    run: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "k").write_bytes(b"image")

    async def test(lab: Lab) -> None:
        pool = lab.pool
        flavour = pool.add(spec(size=1))
        await filled(pool)
        flavour.size = 0
        asked = want(config())
        asked.source.kernel = str(tmp_path / "k")
        shell = pool.take(asked.shape, None, 0)
        assert shell is not None
        opened = asked.source.open()
        await pool.load(shell, asked.config, asked.source, opened)
        opened[0].close()
        pool.put_back(shell)  # its delivery failed: its MAC address was taken, say
        assert flavour.shells == set()
        await until(lambda: not lab.xen.domains)

    run(test)


class DeliveringStock(Delivering):
    """The same for stock guests: what their stores were asked, and who is looked after."""

    _deliver_stock = Daemon._deliver_stock
    _deliver_with_store = Daemon._deliver_with_store
    _takes_late_disks = Daemon._takes_late_disks
    _made = Daemon._made
    _takes_generic = Daemon._takes_generic
    _unwanted = Daemon._unwanted
    _settle = staticmethod(lambda *_: None)

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.lab = lab
        self.loop = asyncio.get_running_loop()
        self.stopping = False
        self.hold: asyncio.Future[None] | None = None
        self.guests = SimpleNamespace(expected=lambda _uuid: nullcontext(), end=self.end)
        self.looked_after: list[str] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    async def in_thread(self, function: Callable[[Any, Registry], Any]) -> Any:
        if self.hold is not None:
            await self.hold
        return function(self.lab.xen.host, self.lab.names)

    def spawn(self, work: Any) -> None:
        self.pool.spawn(work)

    async def end(self, uuid: str) -> None:
        """Destroy a guest."""
        self.looked_after.remove(uuid)
        names = self.lab.names
        with names.entry(uuid) as entry:
            names.forget(entry, names.read(uuid) or Record(uuid, "x"))
        domain = self.lab.xen.of(uuid)
        assert domain is not None
        self.lab.xen.domain_destroy(domain.domid)

    def _guest(self, delivery: Any) -> Any:
        delivery.shell.close_record()
        self.looked_after.append(delivery.shell.uuid)

    async def deliver(self, shell: Any, *, paused: bool = False, **more: Any) -> Any:
        """Deliver the shell as a stock guest."""
        shell.store = store.PRIVATE
        wanted = want(DomainConfig(name="web", memory=4, kernel="k", **more))
        peer = Peer(1, 0, 0, ())
        return await Daemon._deliver_stock(self, shell, wanted, peer, paused=paused)  # type: ignore[arg-type]


def test_a_stock_guest_is_delivered_with_its_store_or_not_at_all(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str, int]] = []
    made: list[str] = []
    failing = False

    def do(tenancy: store.Tenancy) -> None:
        if failing:
            raise DeviceError("no bridge br7")
        record = Registry(lab_path).read(tenancy.uuid)
        assert record is not None
        assert (record.state, record.paused) == (RUNNING, False)  # whoever finds it ends it
        asked.append((tenancy.uuid, tenancy.config.name, tenancy.domid))

    lab_path = ""
    monkeypatch.setattr(store, "LATE_STEPS", (Step("readdress", "execute", "bus", do),))
    anew = Step[store.Tenancy]("open store", "execute", "bus", lambda t: made.append(t.uuid))
    monkeypatch.setattr(store, "STEPS", (anew,))
    monkeypatch.setattr(store, "release", lambda *args: made.append(args[-1]))
    monkeypatch.setattr(store, "serves", lambda: False)

    async def shells(lab: Lab) -> tuple[DeliveringStock, Any]:
        flavour = lab.pool.add(spec(size=1))
        await filled(lab.pool)
        flavour.size = 0
        (shell,) = flavour.shells
        assert lab.pool.take(shell.shape, None, 0) is shell
        del lab.pool.flavours["f"]
        return DeliveringStock(lab), shell

    async def test(lab: Lab) -> None:
        nonlocal failing, lab_path
        lab_path = lab.names.path
        daemon, shell = await shells(lab)
        await daemon.deliver(shell)
        assert asked == [(shell.uuid, "web", shell.domid)]
        assert daemon.looked_after == [shell.uuid]
        assert not lab.xen.domains[shell.domid].paused
        record = lab.names.read(shell.uuid)
        assert record is not None
        assert (record.state, record.store, record.name) == (RUNNING, store.PRIVATE, "web")
        await daemon.end(shell.uuid)

        # It waits for somebody to unpause it; it has the UUID that was asked for.
        daemon, shell = await shells(lab)
        before, uuid = shell.uuid, UUID("00000000-0000-4000-8000-000000000099")
        await daemon.deliver(shell, paused=True, uuid=uuid.bytes)
        assert made == [before, str(uuid)]
        assert lab.xen.domains[shell.domid].paused
        record = lab.names.read(str(uuid))
        assert record is not None
        assert (record.state, record.paused) == (RUNNING, True)
        await daemon.end(str(uuid))

        failing = True
        daemon, shell = await shells(lab)
        with pytest.raises(StepError, match='cannot create "web": readdress: no bridge br7'):
            await daemon.deliver(shell)
        await until(lambda: not lab.xen.domains)
        assert lab.names.uuid_of("web") is None

        # Nobody waits for it any more.
        failing = False
        daemon, shell = await shells(lab)
        daemon.hold = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(daemon.deliver(shell))
        await until(lambda: lab.names.uuid_of("web") is not None)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        daemon.hold.set_result(None)
        await until(lambda: not lab.xen.domains)

    run(test)


def test_a_warm_stock_guest_is_given_its_disks_or_stays_on_its_shelf(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    attached: list[tuple[str, ...]] = []

    def do(tenancy: store.Tenancy) -> None:
        attached.append(tuple(target.identity for target in tenancy.targets))

    monkeypatch.setattr(store, "LATE_STEPS", ())
    step = Step[store.Tenancy]("attach disks", "execute", "devices", do)
    monkeypatch.setattr(store, "DISK_STEPS", (step,))
    monkeypatch.setattr(store, "serves", lambda: False)
    monkeypatch.setattr(disk, "BLKBACK", str(tmp_path))
    monkeypatch.setattr(hotplug, "running", lambda: True)
    disks = (parse_disk(f"{image},raw,xvda,rw")[0],)

    async def test(lab: Lab) -> None:
        flavour = lab.pool.add(spec(size=1))
        await filled(lab.pool)
        flavour.size = 0
        (shell,) = flavour.shells
        shell.store = store.PRIVATE
        daemon: Any = DeliveringStock(lab)
        shape = shape_of(config(disks=disks))
        pages = 99  # of a device page, which a stock guest has not
        wanted: Any = SimpleNamespace(shape=shape, pages=pages, key=lambda _peer: None)
        assert Daemon._from_pool(daemon, wanted, Peer(1, 7, 0, ())) is None  # not root
        assert Daemon._from_pool(daemon, wanted, Peer(1, 0, 0, ())) is shell
        with pytest.raises(DeviceError, match="No such file"):
            await daemon.deliver(shell, disks=disks)
        assert flavour.shells == {shell}
        assert lab.names.uuid_of("web") is None

        image.write_bytes(bytes(4096))
        assert lab.pool.take(shell.shape, None, 0) is shell
        await daemon.deliver(shell, disks=disks)
        assert attached == [(blockdev.identity(image.stat()),)]
        record = lab.names.read(shell.uuid)
        assert record is not None
        assert [each["vdev"] for each in record.disks] == ["xvda"]
        await daemon.end(shell.uuid)

    run(test)


def test_a_shell_that_is_made_is_given_back_if_its_shape_cannot_be_noted(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "k").write_bytes(b"image")
    (tmp_path / "image").write_bytes(bytes(4096))
    disks = (parse_disk(f"{tmp_path}/image,raw,xvda,rw")[0],)

    async def test(lab: Lab) -> None:
        pool = lab.pool
        order, made = pool.order, []

        async def stock(*args: Any, **more: Any) -> Any:
            shell = await order(*args, **more)
            shell.store = store.PRIVATE
            made.append(shell)
            return shell

        def note(*_: Any) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(pool, "order", stock)
        monkeypatch.setattr(pool, "note", note)
        asked = want(DomainConfig(name="web", memory=4, kernel=str(tmp_path / "k"), disks=disks))
        with pytest.raises(OSError, match="Too many"):
            await DeliveringStock(lab)._made(asked, Peer(1, 0, 0, ()), None)
        assert made
        await until(lambda: not lab.xen.domains)

    run(test)


@pytest.mark.parametrize("verb", ["pause", "unpause"])
def test_a_shell_is_not_for_anybody_to_run(verb: str, run: Callable[..., None]) -> None:
    async def test(lab: Lab) -> None:
        flavour = lab.pool.add(spec(size=1))
        await filled(lab.pool)
        (shell,) = flavour.shells
        args = SimpleNamespace(domain=str(shell.domid), verb=verb)
        call: Any = SimpleNamespace(host=lab.xen.host, names=lab.names, args=args, daemon=None)
        with pytest.raises(StateError, match="is a shell of chaosd's pool"):
            pause.run(call)
        assert lab.xen.domains[shell.domid].paused

    run(test)


@pytest.mark.parametrize("young", [False, True], ids=["verified", "refilled"])
def test_contents_that_change_and_leave_no_trace_drain_the_shells(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, young: bool
) -> None:
    """A file keeps its times when a page is written that was written before, through a mapping."""
    monkeypatch.setattr(image, "JUST_NS", 1 << 62 if young else 0)
    monkeypatch.setattr(module, "DIGEST_SECONDS", 1e9 if young else 0.0)
    monkeypatch.setattr(module, "DIGEST_SHARE", math.inf)

    async def test(lab: Lab) -> None:
        pool = lab.pool
        with (
            tempfile.NamedTemporaryFile(dir="/dev/shm", buffering=0) as file,
            mmap.mmap(file.fileno(), file.truncate(4096)) as mapping,
        ):
            mapping[7] = 0
            times = os.fstat(file.fileno())
            config = DomainConfig(name="f", memory=4, kernel=file.name)
            flavour = pool.add(FlavourSpec(name="f", config=config, size=2))
            await filled(pool)
            before, digest = set(flavour.shells), flavour.digest
            assert {shell.digest for shell in before} == {digest}
            mapping[7] = 1
            assert os.fstat(file.fileno()).st_ctime_ns == times.st_ctime_ns
            if young:
                pool.resize("f", 3)
            await until(lambda: not before & flavour.shells)
            await filled(pool)
            assert {shell.digest for shell in flavour.shells} == {flavour.digest} != {digest}
            assert ("pool drained", {"flavour": "f", "shells": 2}) in lab.told

    run(test)


def test_an_image_is_read_once_for_many_shells(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read: list[Any] = []
    monkeypatch.setattr(image, "digest", lambda opened: read.append(opened) or b"digest")
    monkeypatch.setattr(image, "JUST_NS", 0)

    async def test(lab: Lab) -> None:
        (tmp_path / "k").write_bytes(b"k")
        config = DomainConfig(name="f", memory=4, kernel=str(tmp_path / "k"))
        lab.pool.add(FlavourSpec(name="f", config=config, size=8))
        await filled(lab.pool)
        assert len(read) == 1

    run(test)


def test_a_refill_waits_for_a_create_but_not_for_ever(
    run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def turns(count: int = 50) -> None:
        for _ in range(count):
            await asyncio.sleep(0)

    async def test(lab: Lab) -> None:
        pool = lab.pool
        with pool.attending():
            with pool.attending():
                flavour = pool.add(spec("f", size=1))
                await turns()
            await turns()
            assert not flavour.shells
            assert not flavour.making
        await filled(pool)
        monkeypatch.setattr(module, "ATTENTION", 0.0)
        with pool.attending():
            await pool.drain("f")
            await filled(pool)

    monkeypatch.setattr(module, "ATTENTION", 1e6)
    run(test)
