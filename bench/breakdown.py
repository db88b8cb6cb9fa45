"""Where the time of a create goes, for chaos and for xl (LightVM, figure 5), in one boot.

Run it in Dom0, on a host with xenstored::

    scripts/lab run --xenstored -- python3 bench/breakdown.py

Prints JSON: ``spawn`` has milliseconds of posix_spawn of /bin/true, taken in turn with the rest,
and ``samples`` those of `chaos profile --cold --against xl`, by the number of the guest's vifs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from dom0 import TREE, rest, start_daemons
from figures import clock, local, spawn

GUESTS = {0: "hello", 1: "daytime"}
"""Whom a create makes, by the number of vifs."""
AT_A_TIME = 2


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help=f"of {AT_A_TIME} creates each")
    args = parser.parse_args()
    start_daemons()
    configs = local(TREE, *GUESTS.values())
    processes: list[float] = []
    samples: dict[int, list[Any]] = {vifs: [] for vifs in GUESTS}
    for number in range(args.rounds):
        for vifs, name in GUESTS.items():
            rest()
            processes += [clock(lambda: spawn("/bin/true")) for _ in range(AT_A_TIME)]
            command = ["chaos", "profile", "--cold", "--against", "xl", "-q", "--json"]
            done = subprocess.run(
                [*command, "-n", str(AT_A_TIME), str(configs[name])],
                stdout=subprocess.PIPE,
                check=True,
            )
            samples[vifs] += json.loads(done.stdout)["samples"]
        sys.stderr.write(f"breakdown: round {number + 1} of {args.rounds}\n")
    json.dump({"spawn": processes, "samples": samples}, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
