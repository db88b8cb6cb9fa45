#!/usr/bin/env python3
"""How long the bindings take to import, and Xen's libraries to load.

    bench/load_libraries.py [--runs N] [--json]

Each run is a fresh interpreter that has imported nothing but ctypes, because
that is what a command or a builder process starts from. Byte code and libraries
are in the page cache after the first run, which is not counted. The best and
the median run are printed, in milliseconds. Needs no hypervisor.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

RUN = """
import sys, time
sys.path.insert(0, sys.argv[1])
import ctypes
begin = time.perf_counter()
import xenctypes.ctrl, xenctypes.guest, xenctypes.evtchn, xenctypes.foreignmemory
import xenctypes.gnttab, xenctypes.devicemodel, xenctypes.call
imported = time.perf_counter()
from xenctypes.loader import SONAMES, load
from xenctypes.releases import RELEASES
release = RELEASES[tuple(map(int, sys.argv[2].split(".")))]
begin_load = time.perf_counter()
for name in SONAMES:
    load(name, release)
loaded = time.perf_counter()
from xenctypes.ctrl import Xenctrl
opening = time.perf_counter()
Xenctrl(dummy=True, release=release).close()
opened = time.perf_counter()
print(imported - begin, loaded - begin_load, opened - opening, len(SONAMES))
"""


def run(release: str) -> list[str]:
    command = [sys.executable, "-I", "-S", "-c", RUN, str(ROOT), release]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from xenctypes.loader import installed

    release = str(installed())
    count = run(release)[3]
    runs = [[float(value) * 1e3 for value in run(release)[:3]] for _ in range(options.runs)]
    phases = ("import the bindings", f"load {count} libraries", "open and close a dummy handle")
    result = {
        phase: {"best": min(times), "median": statistics.median(times)}
        for phase, times in zip(phases, zip(*runs, strict=True), strict=True)
    }
    if options.json:
        print(json.dumps({"unit": "ms", "release": release, "runs": options.runs} | result))
        return
    print(f"Xen {release}, {options.runs} runs; ms beyond what ctypes takes   best  median")
    for phase, times in result.items():
        print(f"  {phase:48} {times['best']:7.2f} {times['median']:7.2f}")


if __name__ == "__main__":
    main()
