"""Create time against the size of the image (LightVM, Figure 2): chaos and xl, in one boot.

Run it in Dom0, with --xenstored for the rows of xl::

    scripts/lab run --xenstored -- python3 bench/sizes.py --count 7

The image is guests/build/hello.elf with a segment of random bytes behind it, so that all of the
file is loaded into the guest's memory. All guests have the same memory, whatever the image's size:
what grows is the image alone. Prints JSON. ``rows`` has, for each size in bytes, milliseconds
(median, p99) until the reply or the end of the command:

- ``warm``      from chaosd, a shell with the image in it
- ``generic``   from chaosd, a shell without an image
- ``cold``      from chaosd, without a shell
- ``xl``        the whole `xl create` command
- ``spawn``     posix_spawn of /bin/true and the wait for it

``fits`` are straight lines through the medians: ``ms_per_mib``, ``base_ms`` for an image of no
size, and ``r2``, the share of the variance that the line explains. ``over_spawn`` are the medians
by that of all of ``spawn``. ``steps`` are medians of the daemon's steps for a create of the row.

``parts`` says where the slope comes from. The same image is loaded in this process, each call of
libxenguest's timed (``load:...``; ``populate`` gives the domain its memory), and beside it what
such a call is made of, for as many pages as the image has: ``map`` and ``unmap`` of pages of the
domain, ``copy`` of the bytes into them; ``read`` and ``inspect`` of the file (chaos.image), and
``sha256``, what a toolstack would pay that knew its images by their contents.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import struct
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dom0 import TREE, awaited, connect, rest, runs_xenstored, start_chaosd, start_daemons
from figures import clock, fit, medians, ratio, spawn, summary

from chaos import builder, image
from chaos.host import Host

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.client import Chaos

    Rows = dict[str, dict[int, list[float]]]

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4096
SIZES = (50 * KIB, 256 * KIB, MIB, 4 * MIB, 16 * MIB, 64 * MIB)
ROOM_MIB = 16
"""Beside the largest image: its page tables, and what a PV guest is mapped beyond its image."""
WARM, GENERIC, COLD = 0, 1, 2
"""MiB beyond the memory of a warm shell, by which the rows' shapes differ."""
SETTINGS = """
[pool]
adaptive = false

[[flavour]]
name = "generic"
memory = {generic}
size = 1
"""
FLAVOUR = """
[[flavour]]
name = "{name}"
memory = {memory}
kernel = "{kernel}"
size = 1
"""
CONFIG = """
name = "{name}"
type = "pv"
kernel = "{kernel}"
memory = {memory}
"""
PT_LOAD, PF_RW = 1, 6
PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
PHOFF_AT, PHNUM_AT = 32, 56
EVTCHN_PORTS, GRANT_FRAMES, MAPTRACK_FRAMES = 1023, 4, 0


def padded(elf: bytes, size: int) -> bytes:
    """An ELF image of ``size`` bytes: one more segment is loaded behind all others.

    Its program headers move to the end of the file, where there is room for one more. SystemExit
    if the image is larger than that.
    """
    (offset,) = struct.unpack_from("<Q", elf, PHOFF_AT)
    (count,) = struct.unpack_from("<H", elf, PHNUM_AT)
    table = elf[offset : offset + count * PROGRAM_HEADER.size]
    headers = [header for header in PROGRAM_HEADER.iter_unpack(table) if header[0] == PT_LOAD]
    end = max(address + memory for _, _, _, _, address, _, memory, _ in headers)
    at, address = -(-len(elf) // PAGE) * PAGE, -(-end // PAGE) * PAGE
    length = size - at - len(table) - PROGRAM_HEADER.size
    if length <= 0:
        raise SystemExit(f"the image has {len(elf)} bytes already")
    pad = PROGRAM_HEADER.pack(PT_LOAD, PF_RW, at, address, address, length, length, PAGE)
    noise = os.urandom(min(length, MIB))
    filled = (noise * -(-length // len(noise)))[:length]
    head = bytearray(elf.ljust(at, b"\0"))
    struct.pack_into("<Q", head, PHOFF_AT, at + length)
    struct.pack_into("<H", head, PHNUM_AT, count + 1)
    return bytes(head) + filled + table + pad


def label(size: int) -> str:
    """A size as files and guests are called by it."""
    return f"{size // MIB}M" if size % MIB == 0 else f"{size // KIB}K"


class Timed:
    """Somebody whose methods are timed: ``times`` has milliseconds by their names."""

    def __init__(self, target: object) -> None:
        self.__dict__["_target"] = target
        self.__dict__["times"] = {}

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        return partial(self._call, name, found) if callable(found) else found

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._target, name, value)

    def _call(self, name: str, method: Callable[..., Any], *args: Any) -> Any:
        result = []
        took = clock(lambda: result.append(method(*args)))
        self.times[name] = self.times.get(name, 0.0) + took
        return result[0]


class Bench:
    """The rows and the parts, and what makes them."""

    def __init__(self, sizes: list[int], memory: int) -> None:
        self.memory = memory
        self.kernels: dict[int, str] = {}
        self.rows: Rows = {}
        self.steps: dict[str, dict[int, dict[str, list[float]]]] = {}
        self.parts: Rows = {}
        self.number = 0
        hello = (TREE / "guests/build/hello.elf").read_bytes()
        for size in sizes:
            kernel = self.kernels[size] = f"/run/hello-{label(size)}.elf"
            Path(kernel).write_bytes(padded(hello, size))
            config = CONFIG.format(name=label(size), kernel=kernel, memory=memory)
            self.config(size).write_text(config)

    def config(self, size: int) -> Path:
        """The configuration of the guest of a size."""
        return Path(f"/run/hello-{label(size)}.cfg")

    def settings(self) -> str:
        """The daemon's."""
        flavours = [
            FLAVOUR.format(name=f"warm-{label(size)}", kernel=kernel, memory=self.memory)
            for size, kernel in self.kernels.items()
        ]
        return SETTINGS.format(generic=self.memory + GENERIC) + "".join(flavours)

    def _add(self, row: str, size: int, ms: float) -> None:
        self.rows.setdefault(row, {}).setdefault(size, []).append(ms)

    def _create(self, chaos: Chaos, row: str, size: int, more: int) -> None:
        chaos.pool_wait()
        rest()
        self.number += 1
        made: list[Any] = []
        settings = [f"memory={self.memory + more}"] if more else []
        create = partial(chaos.create, self.config(size), settings, name=f"size{self.number}")
        self._add(row, size, clock(lambda: made.append(create())))
        steps = self.steps.setdefault(row, {}).setdefault(size, {})
        for step in awaited(made[0], cold=row == "cold"):
            steps.setdefault(step["name"], []).append(step["ms"])
        chaos.destroy_all()

    def sample(self, chaos: Chaos, *, with_xl: bool) -> None:
        """One sample of each row, for each size."""
        for size in self.kernels:
            for row, more in (("warm", WARM), ("generic", GENERIC), ("cold", COLD)):
                self._create(chaos, row, size, more)
            chaos.pool_wait()
            rest()
            if with_xl:
                command = ("xl", "create", "-q", str(self.config(size)))
                self._add("xl", size, clock(partial(spawn, *command)))
                spawn("xl", "destroy", label(size))
                rest()
            self._add("spawn", size, clock(lambda: spawn("/bin/true")))

    def take_apart(self, host: Host) -> None:
        """One sample of each part, for each size."""
        for size, kernel in self.kernels.items():
            for part, took in self._apart(host, kernel).items():
                self.parts.setdefault(part, {}).setdefault(size, []).append(took)

    def _apart(self, host: Host, kernel: str) -> dict[str, float]:
        found: dict[str, float] = {}
        with image.open_image(kernel) as opened, contextlib.ExitStack() as stack:
            data = bytearray(opened.size)
            found["read"] = clock(lambda: os.preadv(opened.fd, [data], 0))
            found["sha256"] = clock(lambda: hashlib.sha256(data).digest())
            found["inspect"] = clock(lambda: image.inspect(opened))
            domid = host.ctrl.domain_create(
                uuid=os.urandom(16),
                max_vcpus=1,
                max_evtchn_port=EVTCHN_PORTS,
                max_grant_frames=GRANT_FRAMES,
                max_maptrack_frames=MAPTRACK_FRAMES,
            )
            stack.callback(host.ctrl.domain_destroy, domid)
            host.ctrl.domain_max_vcpus(domid, 1)
            host.ctrl.domain_setmaxmem(domid, (self.memory + 1) * KIB)
            builds: list[Any] = []
            found["populate"] = clock(
                lambda: builds.append(builder.populate(host.ctrl, domid, "pv", self.memory))
            )
            build = builds[0]
            stack.callback(build.release)
            found |= _pages(host, domid, builder.last_frames(build, -(-len(data) // PAGE)), data)
            timed = Timed(build)
            request = {
                "ramdisk": False, "reserved": 0, "cmdline": b"", "vcpus": 1, "store_port": 0,
                "console_port": host.ctrl.evtchn_alloc_unbound(domid, 0),
            }  # fmt: skip
            builder.load(timed, request, [opened.fd])  # type: ignore[arg-type]
            timed.release()
            found |= {f"load:{call}": took for call, took in timed.times.items()}
        return found


def _pages(host: Host, domid: int, frames: list[int], data: bytearray) -> dict[str, float]:
    """What it takes to map frames of a domain, to fill them, and to unmap them."""
    maps: list[Any] = []
    found = {"map": clock(lambda: maps.append(host.memory.map(domid, frames)))}
    source = (ctypes.c_char * len(data)).from_buffer(data)
    found["copy"] = clock(lambda: ctypes.memmove(maps[0].address, source, len(data)))
    found["unmap"] = clock(maps[0].close)
    return found


def _summaries(rows: Rows) -> dict[str, Any]:
    """Of each row and size."""
    return {
        row: {str(size): summary(times) for size, times in by_size.items()}
        for row, by_size in rows.items()
    }


def _fits(rows: Rows) -> dict[str, Any]:
    """A straight line through the medians of each row."""
    return {
        row: fit([(size / MIB, summary(times)["median_ms"]) for size, times in by_size.items()])
        for row, by_size in rows.items()
    }


def result(bench: Bench) -> dict[str, Any]:
    """Everything, as plain values."""
    spawned = [took for times in bench.rows["spawn"].values() for took in times]
    return {
        "memory_mib": bench.memory,
        "rows": _summaries(bench.rows),
        "fits": _fits(bench.rows),
        "over_spawn": {
            row: {str(size): ratio(times, spawned) for size, times in by_size.items()}
            for row, by_size in bench.rows.items()
            if row != "spawn"
        },
        "steps": {
            row: {str(size): steps for size, steps in medians(by_size).items()}
            for row, by_size in bench.steps.items()
        },
        "parts": _summaries(bench.parts),
        "part_fits": _fits(bench.parts),
    }


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=7, help="samples of each row and size")
    parser.add_argument("--max-mib", type=int, default=64, help="the largest image")
    args = parser.parse_args()
    sizes = [size for size in SIZES if size <= args.max_mib * MIB]
    with_xl = runs_xenstored()
    os.chdir(TREE)
    start_daemons()
    bench = Bench(sizes, args.max_mib + ROOM_MIB)
    settings = Path("/run/bench-sizes.toml")
    settings.write_text(bench.settings())
    daemon = start_chaosd(settings)
    try:
        with connect() as chaos, contextlib.suppress(KeyboardInterrupt):
            for _ in range(args.count):
                bench.sample(chaos, with_xl=with_xl)
                sys.stderr.write(".")
                sys.stderr.flush()
    finally:
        daemon.terminate()
        daemon.wait()
    with Host() as host:
        for _ in range(args.count):
            bench.take_apart(host)
    json.dump(result(bench), sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
