"""What a thousand running guests cost the next create, and the daemon.

Run it in Dom0 of a host with enough memory::

    scripts/lab run --memory 12G --dom0-memory 2G -- python3 bench/many.py --guests 1000

Prints JSON: a warm create (milliseconds, median and p99) with one guest, before and after, and
with many, their ratio, the daemon's steps (medians), its memory per guest and its CPU while nothing
happens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dom0 import (
    TREE,
    Asker,
    awaited,
    connect,
    cpu_seconds,
    filled,
    rss_kib,
    start_chaosd,
    start_daemons,
    wait,
)
from figures import local, medians, ratio, summary

if TYPE_CHECKING:
    from chaos.client import Chaos

SETTINGS = """
[pool]
adaptive = false

[[flavour]]
name = "hello"
memory = 4
kernel = "/run/hello.elf"
size = 16
"""
SETTLE_SECONDS = 5.0
IDLE_SECONDS = 30.0
WARM_UP = 30  # the first creates run code that the emulator has not translated yet


class Bench:
    """Warm creates one after another, and what the daemon's steps took of them."""

    def __init__(self, chaos: Chaos, config: str) -> None:
        self.chaos = chaos
        self.config = config
        self.plain = Asker()
        self.steps: dict[str, dict[str, list[float]]] = {}

    def rest(self) -> None:
        """Wait until the pool is full and the makers rest."""
        wait(lambda: filled(self.chaos), "the pool is not filled")

    def samples(self, tag: str, count: int) -> list[float]:
        """That many creates, each from a full pool, and each guest destroyed again."""
        found = []
        steps = self.steps.setdefault(tag, {})
        for number in range(count):
            self.rest()
            name = f"{tag}{number}"
            params = {"path": self.config.encode(), "overrides": [f'name="{name}"']}
            elapsed, (made,) = self.plain.create(params)
            found.append(elapsed)
            for step in awaited(made):
                steps.setdefault(step["name"], []).append(step["ms"])
            self.chaos.destroy(name)
        return found

    def fill(self, guests: int) -> None:
        """Make the guests that stay."""
        start = time.monotonic()
        for number in range(guests):
            self.chaos.create(self.config, name=f"g{number}")
            if number % 50 == 49:
                sys.stderr.write(f"{number + 1} guests, {time.monotonic() - start:.0f} s\n")
        self.rest()

    def end(self) -> None:
        """Destroy what was made."""
        self.chaos.call("destroy", all=True)


def measure(bench: Bench, pid: int, guests: int, count: int) -> dict[str, object]:
    """One guest, many, and one again, for the lab is not as fast at all times."""
    result: dict[str, object] = {"guests": guests}
    bench.samples("warm-up", WARM_UP)
    bench.chaos.create(bench.config, name="one")
    few = bench.samples("few", count // 2)
    bench.rest()
    before = rss_kib(pid)
    bench.fill(guests)
    result["daemon_kib_per_guest"] = (rss_kib(pid) - before) / guests
    time.sleep(SETTLE_SECONDS)
    used = cpu_seconds(pid)
    time.sleep(IDLE_SECONDS)
    result["daemon_idle_cpu"] = (cpu_seconds(pid) - used) / IDLE_SECONDS
    many = bench.samples("many", count)
    bench.end()
    bench.chaos.create(bench.config, name="one")
    few += bench.samples("few", count - count // 2)
    bench.end()
    result["few"], result["many"] = summary(few), summary(many)
    result["many_over_few"] = ratio(many, few)
    result["steps"] = medians(bench.steps)
    return result


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guests", type=int, default=1000)
    parser.add_argument("--count", type=int, default=100, help="samples")
    args = parser.parse_args()
    os.chdir(TREE)
    start_daemons()
    settings = Path("/run/bench-many.toml")
    settings.write_text(SETTINGS)
    config = str(local(TREE, "hello")["hello"])
    daemon = start_chaosd(settings)
    try:
        with connect() as chaos:
            result = measure(Bench(chaos, config), daemon.pid, args.guests, args.count)
    finally:
        daemon.terminate()
        daemon.wait()
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
