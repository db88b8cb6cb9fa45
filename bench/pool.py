"""Creates from chaosd's pool against posix_spawn and xl, interleaved in one boot.

Run it in Dom0, with --xenstored for the rows of xl::

    scripts/lab run --xenstored -- python3 bench/pool.py --count 30

Prints JSON: milliseconds (median, p99) and ratios. It starts the daemons that do not run. The rows:

- ``warm``       a request to chaosd's socket, one vif, until the reply; a plain socket, no client
- ``ready``      the same until the guest's ready event was seen by the caller
- ``busy``       as ``warm``, while the pool is refilled
- ``command``    the whole `chaos create` command, one vif, from the pool
- ``generic``    a shell without an image, no vif, until the reply
- ``cold``       no shell at all, no vif, until the reply
- ``spawn``      posix_spawn of /bin/true and the wait for it, in turn with each of these rows
- ``true``       the same by Python's subprocess module
- ``xl``         the whole `xl create` command, no vif
- ``xl_vif``     the same with one vif
- ``refill``     one shell with a vif, made in the background; ``refill_plain``: without a vif

``steps`` are the medians of what the daemon did for a create, by the name of the step.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dom0 import (
    TREE,
    Asker,
    awaited,
    connect,
    filled,
    rest,
    runs_xenstored,
    start_chaosd,
    start_daemons,
    wait,
)
from figures import clock, local, medians, ratio, spawn, summary

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.client import Chaos

SETTINGS = """
[pool]
adaptive = false

[[flavour]]
name = "daytime"
memory = 4
vif = ["bridge=xenbr0"]
kernel = "/run/daytime.elf"
size = 8

[[flavour]]
name = "plain"
memory = 4
kernel = "/run/hello.elf"
size = 8

[[flavour]]
name = "generic"
memory = 5
size = 4
"""
PAIRS = 4
"""Samples that are taken in turn with their peers', from a pool that is full at first."""
FLAVOURS = {"refill": "daytime", "refill_plain": "plain"}


class Bench:
    """The rows, and what makes them."""

    def __init__(self, chaos: Chaos, daytime: str, hello: str) -> None:
        self.chaos = chaos
        self.daytime = daytime
        self.hello = hello
        self.rows: dict[str, list[float]] = {}
        self.steps: dict[str, dict[str, list[float]]] = {}
        self.number = 0
        self.plain = Asker()

    def add(self, row: str, action: Callable[[], object]) -> None:
        """Take one sample."""
        self.rows.setdefault(row, []).append(clock(action))

    def filled(self) -> None:
        """Wait until the pool is full and the makers rest."""
        wait(lambda: filled(self.chaos), "the pool is not filled")

    def rest(self) -> None:
        """The same, and until Dom0 rests."""
        self.filled()
        rest()

    def ask(self, row: str, path: str, *overrides: str, wait_ready: float = 0) -> None:
        """Take one sample of a create that is asked for by hand: the daemon's own time."""
        self.number += 1
        params = {
            "path": path.encode(),
            "overrides": [*overrides, f'name="b{self.number}"'],
            "wait_ready": wait_ready,
        }
        elapsed, (made,) = self.plain.create(params)
        self.rows.setdefault(row, []).append(elapsed)
        steps = self.steps.setdefault(row, {})
        for step in awaited(made, cold=row == "cold"):
            steps.setdefault(step["name"], []).append(step["ms"])

    def end(self) -> None:
        """Destroy what was made."""
        self.chaos.call("destroy", all=True)

    def sample(self, *, with_xl: bool) -> None:
        """One sample of each row."""
        for row, seconds in (("warm", 0), ("ready", 30)):
            self.rest()
            for _ in range(PAIRS):
                self.add("spawn", lambda: spawn("/bin/true"))
                self.ask(row, self.daytime, wait_ready=seconds)
            self.end()
        self.chaos.call("pool.drain", name="daytime")
        wait(lambda: self.chaos.call("pool.list")[0]["ready"], "no shell comes")
        self.ask("busy", self.daytime)
        self.end()
        self.rest()
        for _ in range(PAIRS):
            self.add("true", lambda: subprocess.run(["/bin/true"], check=True))
            self.number += 1
            command = ("chaos", "create", self.daytime, f'name="b{self.number}"')
            self.add("command", partial(spawn, *command))
        self.end()
        for row, memory in (("generic", 5), ("cold", 6)):
            self.rest()
            for _ in range(PAIRS):
                self.add("spawn", lambda: spawn("/bin/true"))
                self.ask(row, self.hello, f"memory={memory}")
            self.end()
        if with_xl:
            for row, path in (("xl", self.hello), ("xl_vif", self.daytime)):
                self.rest()
                self.add(row, partial(spawn, "xl", "create", "-q", path))
                spawn("xl", "destroy", Path(path).stem)

    def refill(self) -> None:
        """How long a whole refill takes, per shell."""
        for row, flavour in FLAVOURS.items():
            self.filled()
            shells = self.chaos.call("pool.drain", name=flavour)["shells"]
            start = time.perf_counter()
            self.filled()
            self.rows.setdefault(row, []).append((time.perf_counter() - start) * 1e3 / shells)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="samples of each row")
    args = parser.parse_args()
    with_xl = runs_xenstored()
    os.chdir(TREE)
    start_daemons()
    configs = local(TREE, "daytime", "hello")
    settings = Path("/run/bench-pool.toml")
    settings.write_text(SETTINGS)
    daemon = start_chaosd(settings)
    try:
        with connect() as chaos:
            bench = Bench(chaos, str(configs["daytime"]), str(configs["hello"]))
            with contextlib.suppress(KeyboardInterrupt):  # with what there is by then
                for number in range(args.count):
                    bench.sample(with_xl=with_xl)
                    if not number % 4:
                        bench.refill()
                    sys.stderr.write(".")
                    sys.stderr.flush()
    finally:
        daemon.terminate()
        daemon.wait()
    rows = bench.rows
    result: dict[str, object] = {name: summary(row) for name, row in rows.items()}
    spawned = rows["spawn"]
    ratios = {
        f"{row}_over_spawn": ratio(rows[row], spawned) for row in ("warm", "ready", "generic")
    }
    ratios["command_over_true"] = ratio(rows["command"], spawned)
    ratios["busy_over_warm"] = ratio(rows["busy"], rows["warm"])
    if with_xl:
        ratios["xl_over_cold"] = ratio(rows["xl"], rows["cold"])
        ratios["xl_vif_over_command"] = ratio(rows["xl_vif"], rows["command"])
        ratios["shells_per_xl_vif"] = ratio(rows["xl_vif"], rows["refill"])
        ratios["plain_shells_per_xl"] = ratio(rows["xl"], rows["refill_plain"])
    result["ratios"] = ratios
    result["steps"] = medians(bench.steps)
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
