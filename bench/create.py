"""Cold creates against xl, interleaved in one boot.

Run it in Dom0 of a host with xenstored::

    scripts/lab run --xenstored -- python3 bench/create.py --count 20

Prints JSON: milliseconds (median, p99) and ratios. The rows:

- ``direct``     the create's own steps in one process, as `chaos create --count` does them
- ``command``    the whole `chaos create` command, without a daemon
- ``xl``         the whole `xl create` command, same configuration
- ``spawn``      posix_spawn of /bin/true and the wait for it
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from figures import clock, ratio, spawn, summary

from chaos import config
from chaos.builder import Builder
from chaos.create import Creation, wait_ready
from chaos.host import Host
from chaos.registry import Registry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="?", default="examples/hello.cfg")
    parser.add_argument("--count", type=int, default=20, help="samples of each row")
    args = parser.parse_args()
    with_xl = subprocess.run(["xl", "info"], capture_output=True, check=False).returncode == 0
    wanted, _ = config.load(args.config)
    rows: dict[str, list[float]] = {"direct": [], "ready": [], "command": [], "xl": [], "spawn": []}
    with Host() as host, Builder() as builder:
        for _ in range(args.count):
            creation = Creation(wanted, host, builder, Registry())
            rows["direct"].append(clock(creation.run))
            ready = wait_ready(creation, 10.0)
            if ready is not None:
                rows["ready"].append(ready)
            if left := creation.undo():
                raise SystemExit("\n".join(left))
            rows["command"].append(clock(lambda: spawn("chaos", "create", "-q", args.config)))
            spawn("chaos", "destroy", wanted.name)
            if with_xl:
                rows["xl"].append(clock(lambda: spawn("xl", "create", "-q", args.config)))
                spawn("xl", "destroy", wanted.name)
            rows["spawn"].append(clock(lambda: spawn("/bin/true")))
    result: dict[str, object] = {name: summary(row) for name, row in rows.items() if row}
    if with_xl:
        result["xl_over_direct"] = ratio(rows["xl"], rows["direct"])
        result["xl_over_command"] = ratio(rows["xl"], rows["command"])
    result["direct_over_spawn"] = ratio(rows["direct"], rows["spawn"])
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
