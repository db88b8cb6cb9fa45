"""chaos beside what a user would pick instead, in one boot, rows in turn.

Run it in Dom0; on a host with xenstored the rows of xl are there too::

    scripts/lab run --xenstored -- python3 bench/compare.py --quick

Prints JSON. ``rows`` has samples under WHO/END, or WHO/VIFSvif/END for what may have a vif: pairs
of when it was taken, in seconds, and what it took, in milliseconds. ``@N`` stands behind what was
measured beside N running guests, ``xN`` behind what took N at once, until the last had come to
that end. Who:

- ``warm``      chaosd's socket: a shell with the image in it; no client is in the time
- ``generic``   the same: a shell without an image
- ``cold``      the same: no shell at all
- ``command``   the command `chaos create`, warm
- ``nodaemon``  the command `chaos --no-daemon create`
- ``xl``        the command `xl create`; ``xl-xendevd`` with the vif plugged by xendevd
- ``crun``, ``runc``  the command `run` of a static true, with the specification that `spec` writes
- ``spawn``, ``python``  posix_spawn of /bin/true and of `python3 -c pass`
- ``refill``    a shell of ``warm``, made in the background

and the ends:

- ``returned``  the reply, or the command's end; with containers and processes that is their own
- ``ready``     of the socket's rows the reply that comes with the guest's ready event; else the
  hypervisor has the guest asleep, which its guests are after all they do at boot
- ``ping``      the guest has answered the first ping; one is sent every few milliseconds

``growth`` has the creates between: pairs of how many guests ran before, and milliseconds.
``categories`` has what ``returned`` took, by LightVM's categories: the daemon's steps, and as the
toolstack's what was besides, the request and the reply.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from dom0 import (
    TREE,
    Asker,
    connect,
    filled,
    rest,
    runs_xenstored,
    start_chaosd,
    start_daemons,
    wait,
)
from figures import clock, local, spawn, spawn_all

from chaos.host import Host
from chaos.profiling import waited

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chaos.client import Chaos

AT_ONCE = 8
SETTINGS = """
[pool]
adaptive = false

[[flavour]]
name = "hello"
memory = 4
kernel = "/run/hello.elf"
size = 10

[[flavour]]
name = "daytime"
memory = 4
vif = ["bridge=xenbr0"]
kernel = "/run/daytime.elf"
size = 8

[[flavour]]
name = "generic"
memory = 5
size = 1

[[flavour]]
name = "generic-vif"
memory = 5
vif = ["bridge=xenbr0"]
size = 1
"""
MEMORY = {"warm": 4, "generic": 5, "cold": 6}
"""MiB of a guest: the pool has shells of 4, and of 5 without an image."""
ENDS = ("returned", "ready", "ping")
GUESTS = {0: "hello", 1: "daytime"}
"""Whom a create makes, by the number of vifs."""
ADDRESS, MAC = "10.77.0.9", "00:16:3e:77:00:09"
PINGED = f"vif=['bridge=xenbr0,mac={MAC},ip={ADDRESS}/16']"
PING_SECONDS = 0.004
WARM_UP = 2  # the first creates run code that the emulator has not translated yet
QUICK = {"count": 9, "every": 3, "at_once": 0, "guests": [20], "beside": 7, "xl_guests": 0}
FULL = {"count": 12, "every": 3, "at_once": 3, "guests": [100, 1000], "beside": 7, "xl_guests": 100}
READY_SECONDS = 60.0


class Pinger:
    """Pings one address without a process; nobody has to resolve it."""

    def __init__(self, address: str, mac: str, bridge: str) -> None:
        spawn("ip", "neigh", "replace", address, "lladdr", mac, "dev", bridge, "nud", "permanent")
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
        self._socket.connect((address, 0))
        self._ident = os.getpid() & 0xFFFF
        self._number = 0

    def until_answered(self) -> None:
        """Ping until there is an answer to any ping since the call."""
        first = self._number + 1
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            self._number += 1
            self._send(self._number & 0xFFFF)
            until = time.monotonic() + PING_SECONDS
            while (left := until - time.monotonic()) > 0:
                self._socket.settimeout(left)
                with contextlib.suppress(TimeoutError):
                    if self._answers(self._socket.recv(2048), first & 0xFFFF):
                        return
        raise SystemExit("no ping was answered")

    def _send(self, number: int) -> None:
        header = struct.pack("!BBHHH", 8, 0, 0, self._ident, number)
        total = sum(struct.unpack("!4H", header))
        checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        with contextlib.suppress(OSError):  # a vif whose carrier is not up yet
            self._socket.send(struct.pack("!BBHHH", 8, 0, checksum, self._ident, number))

    def _answers(self, packet: bytes, first: int) -> bool:
        start = (packet[0] & 15) * 4
        kind, _, _, ident, number = struct.unpack_from("!BBHHH", packet, start)
        return kind == 0 and ident == self._ident and number >= first


class Containers:
    """A bundle with a static true for each runtime that is installed."""

    def __init__(self, folder: Path) -> None:
        self.runtimes = [name for name in ("crun", "runc") if shutil.which(name)]
        self._folder = folder
        self._number = 0
        for name in self.runtimes:
            bundle = folder / name
            program = bundle / "rootfs/bin/true"
            program.parent.mkdir(parents=True)
            shutil.copy("/bin/busybox", program)
            for mount in ("proc", "dev", "sys"):
                (bundle / "rootfs" / mount).mkdir()
            subprocess.run([name, "spec"], cwd=bundle, check=True)
            spec = json.loads((bundle / "config.json").read_text())
            spec["process"]["terminal"] = False
            spec["process"]["args"] = ["/bin/true"]
            (bundle / "config.json").write_text(json.dumps(spec))

    def command(self, name: str) -> tuple[str, ...]:
        """The command line of one more container."""
        self._number += 1
        bundle = str(self._folder / name)
        return (name, "run", "--bundle", bundle, f"compare-{self._number}")


class Comparison:
    """The rows, and what makes them."""

    def __init__(self, chaos: Chaos, host: Host, folder: Path, *, with_xl: bool) -> None:
        self.chaos = chaos
        self.rows: dict[str, list[tuple[float, float]]] = {}
        self.growth: dict[str, list[tuple[int, float]]] = {}
        self.categories: dict[str, list[dict[str, float]]] = {}
        self.guests = 0
        self.with_xl = with_xl
        self._host = host
        self._start = time.monotonic()
        self._asker = Asker()
        self._number = 0
        self._configs = {vifs: str(path) for vifs, path in zip(
            GUESTS, local(TREE, *GUESTS.values()).values(), strict=True)}  # fmt: skip
        self._xendevd = self._configs[1].replace(".cfg", "-xendevd.cfg")
        text = Path(self._configs[1]).read_text()
        script = "bridge=xenbr0,script=/usr/local/bin/vif-xendevd"
        Path(self._xendevd).write_text(text.replace("bridge=xenbr0", script))
        self._pinger = Pinger(ADDRESS, MAC, "xenbr0")
        self._containers = Containers(folder)

    # The pieces

    def _add(self, row: str, milliseconds: float, at_once: int = 1) -> None:
        name = row + (f"x{at_once}" if at_once > 1 else "")
        name += f"@{self.guests}" if self.guests else ""
        taken = round(time.monotonic() - self._start, 3)
        self.rows.setdefault(name, []).append((taken, round(milliseconds, 4)))

    def _name(self) -> str:
        self._number += 1
        return f"b{self._number}"

    def fill(self) -> None:
        """Wait until the pool is full and its makers rest."""
        wait(lambda: filled(self.chaos), "the pool is not filled")

    def rest(self) -> None:
        """The same, and until Dom0 has nothing left to do of what was before."""
        self.fill()
        rest()

    def _request(self, name: str, vifs: int, memory: int, *more: str, ready: float = 0) -> Any:
        overrides = [f'name="{name}"', f"memory={memory}", *more]
        path = self._configs[vifs].encode()
        return {"path": path, "overrides": overrides, "wait_ready": ready}

    @contextlib.contextmanager
    def _gone(self, *names: str, tool: str = "chaos") -> Iterator[None]:
        """Destroy the guests of these names afterwards."""
        yield
        if tool == "chaos":
            self.chaos.destroy(*names)
        else:
            for name in names:
                spawn(tool, "destroy", name)

    def _asleep(self) -> set[int]:
        """The domids of guests that have run, and wait."""
        found = self._host.ctrl.domain_list(1)
        return {each.domid for each in found if each.blocked and not each.paused}

    def _until_asleep(self, before: set[int], count: int) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while len(self._asleep() - before) < count:
            if time.monotonic() > deadline:
                raise SystemExit("a guest does not get ready")
            time.sleep(0.0005)

    # The rows

    def ask(self, who: str, vifs: int, end: str = "returned") -> None:
        """One create by chaosd's socket, to one of the ends."""
        self.rest()
        name = self._name()
        more = [PINGED] if end == "ping" else []
        ready = READY_SECONDS if end == "ready" else 0
        request = self._request(name, vifs, MEMORY[who], *more, ready=ready)
        with self._gone(name):
            elapsed, (made,) = self._asker.create(request)
            if end == "ping":
                elapsed += clock(self._pinger.until_answered)
        if ready and made["ready_ms"] is None:
            raise SystemExit(f"{name} did not get ready")
        self._add(f"{who}/{vifs}vif/{end}", elapsed)
        if end == "returned" and not self.guests:
            sums = waited({"source": who, "caller_ms": elapsed, "profile": made["profile"]})
            sums = {name: round(total, 4) for name, total in sums.items()}
            self.categories.setdefault(f"{who}/{vifs}vif", []).append(sums)

    def ask_at_once(self, who: str, vifs: int) -> None:
        """Several creates by chaosd's socket."""
        self.rest()
        names = [self._name() for _ in range(AT_ONCE)]
        requests = [self._request(name, vifs, MEMORY[who]) for name in names]
        with self._gone(*names):
            elapsed, _ = self._asker.create(*requests)
        self._add(f"{who}/{vifs}vif/returned", elapsed, AT_ONCE)

    def command(self, who: str, vifs: int, at_once: int = 1) -> None:
        """The commands of chaos and of xl: until they returned, and until the guests slept."""
        self.rest()
        tool = "xl" if who.startswith("xl") else "chaos"
        verb = [tool, *(["--no-daemon"] if who == "nodaemon" else []), "create", "-q"]
        path = self._xendevd if who == "xl-xendevd" else self._configs[vifs]
        names = [self._name() for _ in range(at_once)]
        commands = [(*verb, path, f'name="{name}"') for name in names]
        before = self._asleep()
        with self._gone(*names, tool=tool):
            start = perf_counter_ns()
            spawn_all(*commands)
            returned = perf_counter_ns()
            self._until_asleep(before, at_once)
            ready = perf_counter_ns()
        self._add(f"{who}/{vifs}vif/returned", (returned - start) / 1e6, at_once)
        self._add(f"{who}/{vifs}vif/ready", (ready - start) / 1e6, at_once)

    def command_to_ping(self) -> None:
        """The command `chaos create`, warm, until its guest answered a ping."""
        self.rest()
        name = self._name()
        command = ("chaos", "create", "-q", self._configs[1], f'name="{name}"', PINGED)
        with self._gone(name):
            elapsed = clock(partial(spawn, *command)) + clock(self._pinger.until_answered)
        self._add("command/1vif/ping", elapsed)

    def containers(self, at_once: int = 1) -> None:
        """A container of each runtime, to its end."""
        for name in self._containers.runtimes:
            commands = [self._containers.command(name) for _ in range(at_once)]
            self.rest()
            self._add(f"{name}/returned", clock(partial(spawn_all, *commands)), at_once)

    def processes(self, at_once: int = 1) -> None:
        """Processes, by posix_spawn, to their end."""
        for name, argv in (("spawn", ("/bin/true",)), ("python", ("python3", "-c", "pass"))):
            self.rest()
            self._add(f"{name}/returned", clock(partial(spawn_all, *[argv] * at_once)), at_once)

    def refill(self, vifs: int) -> None:
        """A whole flavour's shells, made anew."""
        self.rest()
        shells = self.chaos.pool_drain(GUESTS[vifs])
        self._add(f"refill/{vifs}vif/returned", clock(self.fill) / shells)

    def xl(self) -> None:
        """One sample of each row of xl."""
        for vifs in (0, 1):
            self.command("xl", vifs)
        self.command("xl-xendevd", 1)

    def short(self) -> None:
        """One sample of each row that is told in multiples of a process: with as many of these."""
        for vifs in (0, 1):
            for who, end in (("warm", "returned"), ("warm", "ready"), ("generic", "returned")):
                self.process()
                self.ask(who, vifs, end)
            self.process()
            self.command("command", vifs)
        self.ask("cold", 0)

    def process(self) -> None:
        """One sample of posix_spawn, on a host that rests as it does before a create."""
        self.rest()
        self._add("spawn/returned", clock(lambda: spawn("/bin/true")))

    def long(self) -> None:
        """One sample of each of the other rows that need no xl."""
        self.ask("warm", 1, "ping")
        self.ask("generic", 0, "ready")
        for end in ("ready", "ping"):
            self.ask("generic", 1, end)
        self.command_to_ping()
        self.ask("cold", 0, "ready")
        for end in ENDS:
            self.ask("cold", 1, end)
        self.processes()
        self.containers()

    def without_daemon(self) -> None:
        """One sample of the command that does all by itself."""
        for vifs in (0, 1):
            self.command("nodaemon", vifs)

    def at_once(self) -> None:
        """One sample of each row of several at once."""
        for vifs in (0, 1):
            for who in ("warm", "cold"):
                self.ask_at_once(who, vifs)
            self.command("command", vifs, AT_ONCE)
            if self.with_xl:
                self.command("xl", vifs, AT_ONCE)
        self.containers(AT_ONCE)
        self.processes(AT_ONCE)

    def beside(self) -> None:
        """One sample of each row that is measured again beside running guests."""
        for who, vifs, end in (
            ("warm", 0, "returned"), ("warm", 0, "ready"), ("warm", 1, "returned"),
            ("generic", 0, "returned"), ("cold", 0, "returned"), ("cold", 1, "returned"),
        ):  # fmt: skip
            self.process()
            self.ask(who, vifs, end)
        for vifs in (0, 1):
            self.process()
            self.command("command", vifs)

    # More and more guests

    def grow(self, to: int) -> None:
        """Have more guests run, made one by one, each timed, from a pool that is full."""
        while self.guests < to:
            self.fill()
            elapsed, _ = self._asker.create(self._request(self._name(), 0, MEMORY["warm"]))
            self._grown("warm", elapsed)

    @contextlib.contextmanager
    def grown_by_xl(self, to: int) -> Iterator[None]:
        """The same, by xl; they are gone afterwards."""
        with contextlib.ExitStack() as stack:
            while self.guests < to:
                name = self._name()
                command = ("xl", "create", "-q", self._configs[0], f'name="{name}"')
                elapsed = clock(partial(spawn, *command))
                stack.callback(spawn, "xl", "destroy", name)
                self._grown("xl", elapsed)
            yield

    def _grown(self, tool: str, elapsed: float) -> None:
        self.growth.setdefault(tool, []).append((self.guests, round(elapsed, 4)))
        self.guests += 1


def say(what: str) -> None:
    """A line of progress."""
    sys.stderr.write(f"compare: {what}\n")
    sys.stderr.flush()


def facts() -> dict[str, Any]:
    """What of the host the figures depend on."""
    hypervisor = Path("/sys/hypervisor")
    version = [(hypervisor / f"version/{part}").read_text().strip() for part in ("major", "minor")]
    extra = (hypervisor / "version/extra").read_text().strip()
    packages = ("crun", "runc", "python3", "xenstore-utils")
    shown = "-f=${Package} ${Version}\n"
    listed = subprocess.run(
        ["dpkg-query", "-W", shown, *packages], capture_output=True, check=False
    )
    chaos = subprocess.run(["chaos", "--version"], capture_output=True, check=True)
    return {
        "xen": ".".join(version) + extra,
        "linux": os.uname().release,
        "chaos": chaos.stdout.decode().split()[-1],
        "packages": dict(line.split() for line in listed.stdout.decode().splitlines()),
        "dom0_cpus": os.cpu_count(),
        "dom0_memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "xenstored": runs_xenstored(),
    }


def measure(bench: Comparison, args: argparse.Namespace) -> None:
    """All rows."""
    for _ in range(WARM_UP):
        bench.short()
    bench.rows.clear()
    bench.categories.clear()
    start = time.monotonic()

    def told(what: str) -> None:
        say(f"{what}, {time.monotonic() - start:.0f} s")

    for number in range(args.count):
        bench.short()
        if not number % args.every:
            bench.long()
            for vifs in (0, 1):
                bench.refill(vifs)
            if not args.quick:
                bench.without_daemon()
            if bench.with_xl:
                bench.xl()
            told(f"round {number + 1} of {args.count}")
    for number in range(args.at_once):
        bench.at_once()
        told(f"{AT_ONCE} at once, {number + 1} of {args.at_once}")
    among_many(bench, args, told)


def among_many(bench: Comparison, args: argparse.Namespace, told: Callable[[str], None]) -> None:
    """The rows beside many guests, and those guests themselves."""
    for level in args.guests:
        bench.grow(level)
        told(f"{level} guests run")
        for number in range(args.beside):
            bench.beside()
            if not args.quick:
                bench.containers()
            if bench.with_xl and not args.quick and not number % args.every:
                bench.xl()
        told(f"beside {level} guests")
    if bench.with_xl and args.xl_guests:
        bench.chaos.destroy_all()
        bench.guests = 0
        with bench.grown_by_xl(args.xl_guests):
            told(f"{args.xl_guests} guests of xl run")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="as for the bounds: two minutes")
    parser.add_argument("--count", type=int, help="samples of the short rows")
    parser.add_argument("--every", type=int, help="of them, how many for one of the longer rows")
    parser.add_argument("--at-once", type=int, help="samples of several at once")
    parser.add_argument("--guests", type=int, action="append", help="how many run; repeatable")
    parser.add_argument("--beside", type=int, help="samples beside running guests")
    parser.add_argument("--xl-guests", type=int, help="so many made by xl, in the end")
    chosen = parser.parse_args()
    for name, value in (QUICK if chosen.quick else FULL).items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    return chosen


def main() -> int:
    """Run it."""
    args = _options()
    os.chdir(TREE)
    start_daemons()
    settings = Path("/run/compare.toml")
    settings.write_text(SETTINGS)
    daemon = start_chaosd(settings)
    try:
        with connect() as chaos, Host() as host, tempfile.TemporaryDirectory(dir="/run") as folder:
            bench = Comparison(chaos, host, Path(folder), with_xl=runs_xenstored())
            measure(bench, args)
            result = {
                "host": facts(),
                "rows": bench.rows,
                "growth": bench.growth,
                "categories": bench.categories,
            }
            chaos.destroy_all()
    finally:
        daemon.terminate()
        daemon.wait()
    json.dump(result, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
