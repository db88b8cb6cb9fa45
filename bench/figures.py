"""What the benchmarks share: clocks, summaries, spawning."""

from __future__ import annotations

import math
import os
import re
import statistics
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Row = TypeVar("Row")


def local(tree: Path, *names: str) -> dict[str, Path]:
    """Configurations of examples/ by their names, on Dom0's own tmpfs with their kernels.

    The lab shares the tree by 9p, where one stat(2) takes as long as a whole create does.
    """
    found = {}
    for name in names:  # without fixed addresses: several of a kind run at a time
        kernel = Path(f"/run/{name}.elf")
        kernel.write_bytes((tree / f"guests/build/{name}.elf").read_bytes())
        text = (tree / f"examples/{name}.cfg").read_text()
        found[name] = Path(f"/run/{name}.cfg")
        text = text.replace(f'"guests/build/{name}.elf"', f'"{kernel}"')
        found[name].write_text(re.sub("mac=[0-9a-f:]+,", "", text))
    return found


def clock(action: Callable[[], object]) -> float:
    """Milliseconds that it takes."""
    start = perf_counter_ns()
    action()
    return (perf_counter_ns() - start) / 1e6


def summary(samples: list[float]) -> dict[str, float]:
    """Count, median, p99 (nearest rank) and minimum of milliseconds."""
    ordered = sorted(samples)
    return {
        "count": len(ordered),
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[math.ceil(0.99 * len(ordered)) - 1],
        "min_ms": ordered[0],
    }


def medians(steps: dict[Row, dict[str, list[float]]]) -> dict[Row, dict[str, float]]:
    """Milliseconds of steps, by the row and the name of the step."""
    return {
        row: {name: statistics.median(samples) for name, samples in named.items()}
        for row, named in steps.items()
    }


def ratio(over: list[float], under: list[float]) -> float:
    """Of the medians."""
    return statistics.median(over) / statistics.median(under)


def fit(points: list[tuple[float, float]]) -> dict[str, float]:
    """The straight line through (MiB, milliseconds) with the least squared error.

    ``r2`` is the share of the variance that it explains; 1 if there is none.
    """
    sizes, times = zip(*points, strict=True)
    if len(set(sizes)) == 1:
        return {"ms_per_mib": 0.0, "base_ms": statistics.mean(times), "r2": 0.0}
    slope, base = statistics.linear_regression(sizes, times)
    mean = statistics.mean(times)
    total = sum((time - mean) ** 2 for time in times)
    left = sum((time - base - slope * size) ** 2 for size, time in points)
    return {"ms_per_mib": slope, "base_ms": base, "r2": 1 - left / total if total else 1.0}


def launch(*argv: str) -> int:
    """Start a command, its standard output dropped; its pid."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, 1)]
        return os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
    finally:
        os.close(null)


def spawn(*argv: str) -> None:
    """Run a command to its end; SystemExit if it fails."""
    spawn_all(argv)


def spawn_all(*commands: tuple[str, ...]) -> None:
    """Run commands at once, until all have ended; SystemExit if one fails."""
    pids = {launch(*argv): argv for argv in commands}
    failed = [argv for pid, argv in pids.items() if os.waitpid(pid, 0)[1]]
    if failed:
        raise SystemExit(f"failed: {' '.join(failed[0])}")
