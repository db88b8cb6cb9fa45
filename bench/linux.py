"""A stock Linux guest from the command to its first userland act: chaos against xl, in one boot.

Run it in Dom0 of a host with xenstored::

    scripts/lab run --xenstored --dom0-cpus 1 -- python3 /src/bench/linux.py --count 7

The guest is Dom0's own kernel with a ramdisk whose /init powers off at once; the hypervisor sees
that, whoever made the guest. For each type of guest (pv, pvh) the rows, in turn, from a Dom0 at
rest:

- ``xl``     `xl create -q`: until the command returned, and until userland
- ``cold``   `chaos create -q`, of a shape that the pool does not have
- ``warm``   the same from the pool, kernel and ramdisk built ahead
- ``asked``  the same by a request to chaosd's socket, without the command

Prints JSON: milliseconds (median, p99), ratios, and the medians of chaosd's steps.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from time import perf_counter_ns

from dom0 import PATIENCE, TREE, Asker, awaited, connect, rest, start_chaosd, start_daemons, wait
from figures import ratio, spawn, summary

sys.path.append(str(TREE / "tests/lab"))  # the kernel and the ramdisk are those of the tests
from stock import initramfs, unpacked

from chaos.host import Host
from xenctypes.public import SHUTDOWN_poweroff

INIT = "#!/bin/busybox sh\nexec /bin/busybox poweroff -f\n"
MEMORY = 128
SETTINGS = """
[pool]
adaptive = false
"""
FLAVOUR = """
[[flavour]]
name = "{kind}"
type = "{kind}"
memory = {memory}
kernel = "{kernel}"
ramdisk = "{ramdisk}"
cmdline = "console=hvc0 quiet"
size = 1
"""
CONFIG = """
name = "{name}"
type = "{kind}"
memory = {memory}
kernel = "{kernel}"
ramdisk = "{ramdisk}"
extra = "console=hvc0 quiet"
on_poweroff = "preserve"
"""


class Bench:
    """The rows, and what makes them."""

    def __init__(self, host: Host, folder: Path) -> None:
        self.host = host
        self.folder = folder
        self.rows: dict[str, list[float]] = {}
        self.steps: dict[str, list[float]] = {}
        self.kernel = unpacked(folder)
        self.ramdisk = initramfs(folder, INIT)

    def flavours(self) -> str:
        """The pool's settings."""
        return SETTINGS + "".join(
            FLAVOUR.format(kind=kind, memory=MEMORY, kernel=self.kernel, ramdisk=self.ramdisk)
            for kind in ("pv", "pvh")
        )

    def config(self, name: str, kind: str, memory: int) -> str:
        """The path of a configuration."""
        path = self.folder / f"{name}.cfg"
        text = CONFIG.format(
            name=name, kind=kind, memory=memory, kernel=self.kernel, ramdisk=self.ramdisk
        )
        path.write_text(text)
        return str(path)

    def sample(self, tool: str, row: str, kind: str, memory: int) -> None:
        """One guest: made, seen in userland, destroyed."""
        name = f"{row}-{kind}"
        path = self.config(name, kind, memory)
        asker = Asker()
        rest()
        start = perf_counter_ns()
        if row == "asked":
            _, (made,) = asker.create({"path": path.encode(), "overrides": []})
            for step in awaited(made):
                self.steps.setdefault(f"{kind}: {step['name']}", []).append(step["ms"])
        else:
            spawn(tool, "create", "-q", path)
        returned = perf_counter_ns()
        deadline = time.monotonic() + PATIENCE
        while not any(
            info.shutdown_reason == SHUTDOWN_poweroff for info in self.host.ctrl.domain_list()
        ):
            if time.monotonic() > deadline:
                raise SystemExit(f"{name} does not get to userland")
            time.sleep(0.001)
        ended = perf_counter_ns()
        spawn(tool, "destroy", name)
        self.rows.setdefault(f"{name}-create", []).append((returned - start) / 1e6)
        self.rows.setdefault(f"{name}-userland", []).append((ended - start) / 1e6)

    def ratios(self, kind: str) -> dict[str, float]:
        """Chaos over xl."""
        rows = self.rows
        return {
            f"{kind}_{row}_{what}_over_xl": ratio(
                rows[f"{row}-{kind}-{what}"], rows[f"xl-{kind}-{what}"]
            )
            for row in ("cold", "warm", "asked")
            for what in ("create", "userland")
        }


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=7, help="samples of each row")
    args = parser.parse_args()
    os.chdir(TREE)
    start_daemons()
    with Host() as host, tempfile.TemporaryDirectory(dir="/run") as folder:
        bench = Bench(host, Path(folder))
        settings = Path(folder) / "chaos.toml"
        settings.write_text(bench.flavours())
        daemon = start_chaosd(settings)
        try:
            with connect() as chaos, contextlib.suppress(KeyboardInterrupt):

                def filled() -> bool:
                    return all(f["ready"] and not f["making"] for f in chaos.call("pool.list"))

                for _ in range(args.count):
                    for kind in ("pv", "pvh"):
                        for tool, row, more in (
                            ("xl", "xl", 0), ("chaos", "cold", 1), ("chaos", "warm", 0),
                            ("chaos", "asked", 0),
                        ):  # fmt: skip
                            wait(filled, "the pool is not filled")
                            bench.sample(tool, row, kind, MEMORY + more)
                    sys.stderr.write(".")
                    sys.stderr.flush()
        finally:
            daemon.terminate()
            daemon.wait()
    result: dict[str, object] = {name: summary(row) for name, row in bench.rows.items()}
    result["steps"] = {name: summary(row)["median_ms"] for name, row in bench.steps.items()}
    result["ratios"] = {**bench.ratios("pv"), **bench.ratios("pvh")}
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
