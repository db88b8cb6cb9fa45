"""As many guests as the host holds: what each costs, and what grows with their number.

Run it in Dom0 of a host with much memory, alone on its machine::

    scripts/lab run --memory 17G --dom0-memory 3G -- python3 bench/density.py --leave

The guests are examples/tiny.cfg, of 1 MiB, and then examples/daytime.cfg, each with a vif on xenbr0
and an address, all pinged in the end. They come in rounds of --step: chaosd's pool makes the
shells of a round (nothing else happens meanwhile), then they are asked for one by one while its
makers are stopped, and when the last has said that it is ready the host is looked at. So what is
made ahead and what somebody waits for are seen apart, each with its own growth, and the memory is
that of guests. Prints JSON; of ``rounds``, by kind of guest, each has

- ``guests``   how many there were at its end
- ``shell``    milliseconds for one shell, by the clock on the wall: all makers together
- ``create``   milliseconds until the reply: count, median, p99, minimum
- ``steps``    medians of the steps, of the shell ("prepare") and of the create ("execute")
- ``ready``    milliseconds from unpause to the guest's ready event, of one in ten
- ``memory``   KiB: what the hypervisor has free, the pages of all guests, of Dom0's memory what is
  available and some of its parts, and what chaosd and its makers have (proportional set sizes)
- ``calls``    every few rounds: medians, in milliseconds, of calls made by this process for a
  domain of its own, by the name of the function in libxenctrl and the like; ``spawn`` is
  posix_spawn of /bin/true and the wait for it
- ``daemon_cpu``  seconds of processor that chaosd took for the round, and its makers

``per_guest`` splits the memory, KiB for each guest: its own pages, the hypervisor's, the Dom0
kernel's, the files in /run, the daemon's. ``growth`` is the last round over the first, of
the times above. --leave leaves the guests to the end of the lab: destroying them takes a while.
Interrupted, it tells of the rounds that are done.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import statistics
import struct
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dom0 import TREE, connect, cpu_seconds, start_chaosd, start_daemons, wait
from figures import clock, local, medians, spawn, summary

from chaos.host import Host

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chaos.client import Chaos

PAGE_KIB = 4
SETTINGS = """
[pool]
adaptive = false
max_shells = 2000

[[flavour]]
name = "tiny"
memory = 1
kernel = "/run/tiny.elf"
size = 0
low = 1

[[flavour]]
name = "daytime"
memory = 4
vif = ["bridge=xenbr0"]
kernel = "/run/daytime.elf"
size = 0
low = 1
"""
CALL_SAMPLES = 10
WARM_UP = 30  # the first creates run code that the emulator has not translated yet
READY_SECONDS = 120.0
READY_EVERY = 10  # guests, one of which is asked how soon it was ready
NETWORK, PREFIX = "10.78", 16
PER_SUBNET = 250
MEMINFO = ("MemFree", "MemAvailable", "Slab", "SUnreclaim", "PageTables", "KernelStack", "Percpu",
           "VmallocUsed", "Shmem", "AnonPages")  # fmt: skip
EVTCHN_PORTS, GRANT_FRAMES, MAPTRACK_FRAMES = 1023, 4, 0
PAGES = 256
ICMP_ECHO, ICMP_REPLY = 8, 0
ATTEMPTS = 4
REPLY_SECONDS = 5.0
AT_ONCE = 8
"""Few: who has an address is asked at every port of the bridge, which wakes all the guests."""


class Calls:
    """What a toolstack asks of the hypervisor and of Dom0's kernel, call by call.

    A domain of this process's own is made and destroyed; nothing of chaosd's is in the way. A call
    whose time grows with the number of guests shows who the growth belongs to.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.times: dict[str, list[float]] = {}

    def _take(self, call: str, *args: Any, **named: Any) -> Any:
        owner, _, name = call.partition(".")
        method = getattr(getattr(self.host, owner), name)
        result: list[Any] = []
        took = clock(lambda: result.append(method(*args, **named)))
        self.times.setdefault(name, []).append(took)
        return result[0]

    def sample(self) -> None:
        """Each call once."""
        take = self._take
        take("ctrl.physinfo")
        domid = take(
            "ctrl.domain_create",
            uuid=os.urandom(16),
            max_vcpus=1,
            max_evtchn_port=EVTCHN_PORTS,
            max_grant_frames=GRANT_FRAMES,
            max_maptrack_frames=MAPTRACK_FRAMES,
        )
        try:
            take("ctrl.domain_max_vcpus", domid, 1)
            take("ctrl.domain_setmaxmem", domid, PAGES * PAGE_KIB)
            frames = take("ctrl.domain_populate_physmap", domid, range(PAGES))
            remote = take("ctrl.evtchn_alloc_unbound", domid, 0)
            port = take("evtchn.bind_interdomain", domid, remote)
            self.host.evtchn.drain()
            mapping = take("memory.map", domid, frames[:1])
            self.times.setdefault("unmap", []).append(clock(mapping.close))
            take("evtchn.unbind", port)
            take("ctrl.domain_unpause", domid)
            take("ctrl.domain_pause", domid)
            take("ctrl.domain_info", domid)
        finally:
            take("ctrl.domain_destroy", domid)
        self.times.setdefault("spawn", []).append(clock(lambda: spawn("/bin/true")))

    def medians(self, count: int) -> dict[str, float]:
        """Of ``count`` samples, and of a list of all domains."""
        self.times = {}
        self.sample()  # to have it all translated
        self.times = {}
        for _ in range(count):
            self.sample()
        self._take("ctrl.domain_list")
        return {name: statistics.median(times) for name, times in self.times.items()}


def family(pid: int) -> list[int]:
    """A process and its children."""
    found = [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(stat[1]) == pid:
                    found.append(int(entry.name))
    return found


def pss_kib(pid: int) -> int:
    """What a process has of Dom0's memory, shared pages divided by those who share them."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    raise SystemExit("no Pss")


def memory(host: Host, daemon: int) -> dict[str, int]:
    """Where the host's memory is, in KiB."""
    domains = host.ctrl.domain_list()
    found = {
        "domains": len(domains) - 1,
        "xen_free": host.ctrl.physinfo().free_pages * PAGE_KIB,
        "guest_pages": sum(info.tot_pages for info in domains if info.domid) * PAGE_KIB,
    }
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in MEMINFO:
            found[name] = int(value.split()[0])
    first, *others = family(daemon)
    found["chaosd"] = pss_kib(first)
    found["makers"] = sum(pss_kib(pid) for pid in others)
    return found


def per_guest(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """KiB that each of the guests between two looks has taken, by who has them."""
    count = after["domains"] - before["domains"]
    grown = {name: (after[name] - before[name]) / count for name in after}
    daemon = grown["chaosd"] + grown["makers"]
    return {
        "guest": grown["guest_pages"],
        "xen": -grown["xen_free"] - grown["guest_pages"],
        "dom0_kernel": -grown["MemAvailable"] - grown["Shmem"] - daemon,
        "dom0_kernel_slab": grown["Slab"],
        "dom0_kernel_page_tables": grown["PageTables"],
        "run_files": grown["Shmem"],
        "chaosd": grown["chaosd"],
        "makers": grown["makers"],
    }


def address(number: int) -> str:
    """Of a guest."""
    return f"{NETWORK}.{1 + number // PER_SUBNET}.{1 + number % PER_SUBNET}"


def echo(number: int) -> bytes:
    """An ICMP echo request, its checksum done."""
    body = struct.pack("!BBHHH", ICMP_ECHO, 0, 0, os.getpid() & 0xFFFF, number & 0xFFFF)
    total = sum(struct.unpack(f"!{len(body) // 2}H", body))
    total = (total & 0xFFFF) + (total >> 16)
    return body[:2] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + body[4:]


def ping(addresses: list[str]) -> dict[str, float]:
    """Milliseconds until each address answered; those that do not in several attempts lack."""
    found: dict[str, float] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        poll = select.poll()
        poll.register(raw, select.POLLIN)
        for attempt in range(ATTEMPTS):
            left = [each for each in addresses if each not in found]
            for start in range(0, len(left), AT_ONCE):
                waiting = {}
                for each in left[start : start + AT_ONCE]:
                    waiting[each] = time.perf_counter_ns()
                    raw.sendto(echo(attempt), (each, 0))
                deadline = time.monotonic() + REPLY_SECONDS
                while waiting and (rest := deadline - time.monotonic()) > 0:
                    if not poll.poll(rest * 1e3):
                        break
                    packet, (source, _) = raw.recvfrom(2048)
                    header = (packet[0] & 15) * 4
                    if packet[header] == ICMP_REPLY and source in waiting:
                        sent = waiting.pop(source)
                        found[source] = (time.perf_counter_ns() - sent) / 1e6
    return found


class Bench:
    """The guests, and what is known of them."""

    def __init__(self, host: Host, chaos: Chaos, daemon: int, configs: dict[str, Path]) -> None:
        self.host = host
        self.chaos = chaos
        self.daemon = daemon
        self.configs = configs
        self.calls = Calls(host)
        self.made = 0

    def _settled(self, flavour: str) -> bool:
        found = next(f for f in self.chaos.pool_list() if f["name"] == flavour)
        return not found["ready"] and not found["making"]

    @contextlib.contextmanager
    def _makers_stopped(self) -> Iterator[None]:
        """The pool refills itself after a moment's rest, which a slow create may well be."""
        makers = family(self.daemon)[1:]
        try:
            for pid in makers:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in makers:
                os.kill(pid, signal.SIGCONT)

    def _overrides(self, flavour: str) -> list[str]:
        if flavour != "daytime":
            return []
        return [f'vif=["bridge=xenbr0,ip={address(self.made)}/{PREFIX}"]']

    def _create(self, flavour: str, times: list[float]) -> dict[str, Any]:
        made: list[Any] = []
        config, overrides = self.configs[flavour], self._overrides(flavour)
        create = partial(self.chaos.create, config, overrides, name=f"{flavour}{self.made}")
        times.append(clock(lambda: made.append(create())))
        self.made += 1
        found: dict[str, Any] = made[0]
        return found

    def round(self, flavour: str, count: int) -> dict[str, Any]:
        """So many more guests."""
        family_cpu = {pid: cpu_seconds(pid) for pid in family(self.daemon)}
        start = time.perf_counter()
        self.chaos.pool_resize(flavour, count)
        self.chaos.pool_wait(flavour)
        shell = (time.perf_counter() - start) * 1e3 / count
        times: list[float] = []
        with self._makers_stopped():
            guests = [self._create(flavour, times) for _ in range(count)]
            self.chaos.pool_resize(flavour, 0)
        wait(lambda: self._settled(flavour), "the pool does not come to rest")
        ready = [
            self.chaos.wait(guest["uuid"], timeout=READY_SECONDS)["ready_ms"]
            for guest in (*guests[:-1:READY_EVERY], guests[-1])
        ]
        steps: dict[str, dict[str, list[float]]] = {}
        for guest in guests:
            for step in guest["profile"]["steps"]:
                by_name = steps.setdefault(step["phase"], {})
                by_name.setdefault(step["name"], []).append(step["ms"])
        now = {pid: cpu_seconds(pid) - before for pid, before in family_cpu.items()}
        return {
            "guests": self.made,
            "shell": shell,
            "create": summary(times),
            "ready": summary([each for each in ready if each is not None]),
            "steps": medians(steps),
            "daemon_cpu": {
                "chaosd": now[self.daemon],
                "makers": sum(used for pid, used in now.items() if pid != self.daemon),
            },
            "memory": memory(self.host, self.daemon),
        }

    def rounds(
        self, flavour: str, total: int, step: int, calls_every: int
    ) -> Iterator[dict[str, Any]]:
        """Rounds until there are so many guests of the kind."""
        self.made = done = 0
        started = time.monotonic()
        while self.made < total:
            each = self.round(flavour, min(step, total - self.made))
            if not done % calls_every or self.made >= total:
                each["calls"] = self.calls.medians(CALL_SAMPLES)
            done += 1
            sys.stderr.write(
                f"{self.made} {flavour}, {time.monotonic() - started:.0f} s: shell"
                f" {each['shell']:.0f} ms, create {each['create']['median_ms']:.1f} ms\n"
            )
            yield each

    def warm_up(self, flavour: str) -> None:
        """Make and destroy a few."""
        self.made = 0
        self.chaos.destroy(*(self._create(flavour, [])["uuid"] for _ in range(WARM_UP)))


def growth(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The last round over the first one, of what took time."""
    first, last = rounds[0], rounds[-1]
    asked = [each["calls"] for each in rounds if "calls" in each]

    def over(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
        return {name: after[name] / before[name] for name in after if before.get(name)}

    return {
        "shell": last["shell"] / first["shell"],
        "create": last["create"]["median_ms"] / first["create"]["median_ms"],
        "ready": last["ready"]["median_ms"] / first["ready"]["median_ms"],
        "steps": {
            phase: over(steps, first["steps"][phase]) for phase, steps in last["steps"].items()
        },
        "calls": over(asked[-1], asked[0]),
    }


def measure(
    bench: Bench, flavour: str, total: int, args: argparse.Namespace, result: dict[str, Any]
) -> None:
    """All rounds of a kind of guest, into the result as they come."""
    bench.warm_up(flavour)
    before = memory(bench.host, bench.daemon)
    rounds = result["rounds"][flavour] = []
    for each in bench.rounds(flavour, total, args.step, args.calls_every):
        rounds.append(each)
        result["per_guest"][flavour] = per_guest(before, each["memory"])
        result["growth"][flavour] = growth(rounds)


def ping_all(count: int) -> dict[str, Any]:
    """How many guests answered, and how soon."""
    spawn("ip", "addr", "replace", f"{NETWORK}.0.1/{PREFIX}", "dev", "xenbr0")
    answered = ping([address(number) for number in range(count)])
    found: dict[str, Any] = {"asked": count, "answered": len(answered)}
    return found | (summary(list(answered.values())) if answered else {})


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guests", type=int, default=8000, help="without a vif")
    parser.add_argument("--vifs", type=int, default=1000, help="guests with a vif, 1000 at most")
    parser.add_argument("--step", type=int, default=100, help="guests in a round")
    parser.add_argument("--calls-every", type=int, default=5, help="rounds")
    parser.add_argument("--leave", action="store_true", help="do not destroy them in the end")
    args = parser.parse_args()
    os.chdir(TREE)
    start_daemons()
    settings = Path("/run/bench-density.toml")
    settings.write_text(SETTINGS)
    configs = local(TREE, "tiny", "daytime")
    daemon = start_chaosd(settings)
    result: dict[str, Any] = {"rounds": {}, "per_guest": {}, "growth": {}}
    try:
        with connect() as chaos, Host() as host:
            bench = Bench(host, chaos, daemon.pid, configs)
            with contextlib.suppress(KeyboardInterrupt):
                for flavour, total in (("tiny", args.guests), ("daytime", args.vifs)):
                    if total:
                        measure(bench, flavour, total, args, result)
                if args.vifs:
                    result["ping"] = ping_all(args.vifs)
            if not args.leave:
                took = clock(chaos.destroy_all)
                result["destroy_ms_per_guest"] = took / (args.guests + args.vifs)
    finally:
        daemon.terminate()
        daemon.wait()
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
