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

from figures import clock, local, ratio, summary
from pool import TREE, connect, start_chaosd, start_daemons, wait

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


def rss_kib(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise SystemExit("no VmRSS")


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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

            def filled() -> bool:
                flavour = chaos.call("pool.list")[0]
                return bool(flavour["ready"] == flavour["size"] and not flavour["making"])

            def samples(tag: str, count: int = args.count) -> list[float]:
                found = []
                for number in range(count):
                    wait(filled, "the pool is not filled")
                    name = f"{tag}{number}"
                    found.append(clock(lambda name=name: chaos.create(config, name=name)))
                    chaos.destroy(name)
                return found

            samples("warm-up", WARM_UP)
            chaos.create(config, name="one")
            few = samples("few")
            wait(filled, "the pool is not filled")
            before = rss_kib(daemon.pid)
            start = time.monotonic()
            for number in range(args.guests):
                chaos.create(config, name=f"g{number}")
                if number % 50 == 49:
                    sys.stderr.write(f"{number + 1} guests, {time.monotonic() - start:.0f} s\n")
            wait(filled, "the pool is not filled")
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
