"""What a thousand running guests cost the next create, and the daemon.

Run it in Dom0 of a host with enough memory::

    scripts/lab run --memory 12G --dom0-memory 2G -- python3 bench/many.py --guests 1000

Prints JSON: a warm create (milliseconds, median and p99) with few guests and with many, their
ratio, the daemon's memory per guest and its CPU while nothing happens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from dom0 import (
    TREE,
    connect,
    cpu_seconds,
    filled,
    rss_kib,
    start_chaosd,
    start_daemons,
    wait,
)
from figures import clock, local, ratio, summary

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


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--guests", type=int, default=1000)
    parser.add_argument("--count", type=int, default=50, help="samples")
    args = parser.parse_args()
    os.chdir(TREE)
    start_daemons()
    settings = Path("/run/bench-many.toml")
    settings.write_text(SETTINGS)
    config = local(TREE, "hello")["hello"]
    daemon = start_chaosd(settings)
    result: dict[str, object] = {"guests": args.guests}
    try:
        with connect() as chaos:

            def rest() -> None:
                wait(lambda: filled(chaos), "the pool is not filled")

            def samples(tag: str, count: int = args.count) -> list[float]:
                found = []
                for number in range(count):
                    rest()
                    name = f"{tag}{number}"
                    found.append(clock(lambda name=name: chaos.create(config, name=name)))
                    chaos.destroy(name)
                return found

            samples("warm-up", WARM_UP)
            chaos.create(config, name="one")
            few = samples("few")
            rest()
            before = rss_kib(daemon.pid)
            start = time.monotonic()
            for number in range(args.guests):
                chaos.create(config, name=f"g{number}")
                if number % 50 == 49:
                    sys.stderr.write(f"{number + 1} guests, {time.monotonic() - start:.0f} s\n")
            rest()
            result["daemon_kib_per_guest"] = (rss_kib(daemon.pid) - before) / args.guests
            time.sleep(SETTLE_SECONDS)
            used = cpu_seconds(daemon.pid)
            time.sleep(IDLE_SECONDS)
            result["daemon_idle_cpu"] = (cpu_seconds(daemon.pid) - used) / IDLE_SECONDS
            many = samples("many")
            result["few"], result["many"] = summary(few), summary(many)
            result["many_over_few"] = ratio(many, few)
            chaos.call("destroy", all=True)
    finally:
        daemon.terminate()
        daemon.wait()
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
