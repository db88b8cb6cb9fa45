"""What repeated creates of one configuration took: medians and p99 by step and by category. Pure.

A sample is what `chaos create --json` prints of one create, with two things more: ``caller_ms``,
which is how long the caller waited, and ``source``, which says where its shell came from. The
categories are those of LightVM's Figure 5, and "guest boot", from unpause to the ready event.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from chaos.steps import BUS, CONFIG, DEVICES, EXECUTE, HYPERVISOR, IMAGE, PREPARE, TOOLSTACK
from chaos.xllog import MIXED, XL

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from chaos.schedule import Run

    Sample = dict[str, Any]

BOOT = "guest boot"
CATEGORIES = (CONFIG, TOOLSTACK, HYPERVISOR, MIXED, BUS, DEVICES, IMAGE, BOOT)
READY = "unpause to ready"
WIDTH = 40
TRACKS = {
    PREPARE: "prepare: ahead of the create",
    EXECUTE: "execute: somebody waits",
    BOOT: "guest",
    XL: "xl create, by its log",
}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and p99 of milliseconds; the latter is what 99 % do not exceed (nearest rank)."""
    ordered = sorted(values)
    p99 = ordered[math.ceil(0.99 * len(ordered)) - 1]
    return {"median_ms": statistics.median(ordered), "p99_ms": p99}


def rows(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Each step, in order: where it begins after the first of its phase, and how long it takes."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for sample in samples:
        first: dict[str, int] = {}
        for step in sample["profile"]["steps"]:
            first[step["phase"]] = min(first.get(step["phase"], step["start_ns"]), step["start_ns"])
        for step in (*sample["profile"]["steps"], *_boot(sample)):
            phase = EXECUTE if step["phase"] == BOOT else step["phase"]
            start = step["start_ns"] - first[phase]
            row = found.setdefault(
                (phase, step["name"]),
                {"name": step["name"], "phase": phase, "category": step["category"],
                 "starts": [], "times": []},
            )  # fmt: skip
            row["starts"].append(start / 1e6)
            row["times"].append(step["ms"])
    return [
        {
            "name": row["name"],
            "phase": row["phase"],
            "category": row["category"],
            "start_ms": statistics.median(row["starts"]),
            **spread(row["times"]),
        }
        for row in sorted(found.values(), key=lambda row: row["phase"] == EXECUTE)
    ]


def _boot(sample: Sample) -> list[dict[str, Any]]:
    """The guest's own part as a step; it begins when the last step is done."""
    ready = sample["profile"]["ready_ms"]
    if ready is None:
        return []
    last = sample["profile"]["steps"][-1]
    start = last["start_ns"] + int(last["ms"] * 1e6)
    return [{"name": READY, "phase": BOOT, "category": BOOT, "start_ns": start, "ms": ready}]


def waited(sample: Sample) -> dict[str, float]:
    """Milliseconds that the caller of one create waited, by category, without the guest's boot.

    What is in no step is the toolstack's: the request, its reading, and the reply.
    """
    sums: dict[str, float] = {}
    for step in sample["profile"]["steps"]:
        if step["phase"] != PREPARE or sample["source"] == "cold":
            sums[step["category"]] = sums.get(step["category"], 0.0) + step["ms"]
    if "logged_ms" not in sample:  # of what a log tells, all is in a step
        besides = sample["caller_ms"] - sum(sums.values())
        sums[TOOLSTACK] = sums.get(TOOLSTACK, 0.0) + max(0.0, besides)
    return sums


def categories(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Of each category that took part, the time of one create while somebody waited for it."""
    found: dict[str, list[float]] = {}
    for sample in samples:
        sums = waited(sample)
        for step in _boot(sample):
            sums[BOOT] = step["ms"]
        for category, total in sums.items():
            found.setdefault(category, []).append(total)
    return {name: spread(found[name]) for name in CATEGORIES if name in found}


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """Everything that is shown, as plain values."""
    profiles = [sample["profile"] for sample in samples]
    ready = [profile["ready_ms"] for profile in profiles if profile["ready_ms"] is not None]
    return {
        "count": len(samples),
        "sources": {
            source: sum(sample["source"] == source for sample in samples)
            for source in dict.fromkeys(sample["source"] for sample in samples)
        },
        "steps": rows(samples),
        "categories": categories(samples),
        "prepare": spread([profile["prepare_ms"] for profile in profiles]),
        "execute": spread([profile["execute_ms"] for profile in profiles]),
        "caller": spread([sample["caller_ms"] for sample in samples]),
        "boot": spread(ready) if ready else None,
    }


def against(samples: Sequence[Sample], commands: Sequence[float]) -> dict[str, Any]:
    """What is shown of another toolstack's samples, beside our own command's milliseconds."""
    times = spread([sample["caller_ms"] for sample in samples])
    command = spread(commands)
    return {
        "toolstack": samples[0]["source"],
        **times,
        "command": command,
        "ratio": times["median_ms"] / command["median_ms"],
        "logged": spread([sample["logged_ms"] for sample in samples]),
        "steps": rows(samples),
        "categories": categories(samples),
    }


def bar(start: float, length: float, total: float, width: int = WIDTH) -> str:
    """A line of a waterfall: at least one mark, none beyond ``width``."""
    if total <= 0:
        return ""
    at = min(int(start / total * width), width - 1)
    marks = max(1, round(length / total * width))
    return " " * at + "█" * min(marks, width - at)


def waterfall(found: Sequence[dict[str, Any]]) -> list[str]:
    """The bar of each row, each phase on a scale of its own."""
    ends: dict[str, float] = {}
    for row in found:
        end = row["start_ms"] + row["median_ms"]
        ends[row["phase"]] = max(ends.get(row["phase"], 0.0), end)
    return [bar(row["start_ms"], row["median_ms"], ends[row["phase"]]) for row in found]


def trace(samples: Sequence[Sample], runs: Iterable[Run] = ()) -> dict[str, Any]:
    """The samples as Chrome trace events, on the host's monotonic clock.

    The format is the Trace Event Format's JSON object, which Perfetto and chrome://tracing open;
    a create is a thread of its own on each of the tracks, and the host's processes have one
    track for each name, with the ``runs`` of their threads.
    """
    spans = [
        {
            "name": step["name"],
            "cat": step["category"],
            "ts": step["start_ns"] / 1e3,
            "dur": step["ms"] * 1e3,
            "pid": TRACKS[step["phase"]],
            "tid": number,
            "args": {"domain": sample["name"], "domid": sample["domid"]},
        }
        for number, sample in enumerate(samples, 1)
        for step in (*sample["profile"]["steps"], *_boot(sample))
    ]
    spans += [
        {
            "name": f"on processor {run.cpu}",
            "cat": "process",
            "ts": run.start,
            "dur": run.us,
            "pid": f"process {run.name}",
            "tid": run.pid,
        }
        for run in runs
    ]
    tracks = [*TRACKS.values(), *sorted({span["pid"] for span in spans} - {*TRACKS.values()})]
    pids = {name: number for number, name in enumerate(tracks, 1)}
    used = {span["pid"] for span in spans}
    events: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": pids[name], "tid": 0, "args": {"name": name}}
        for name in tracks
        if name in used
    ]
    events += [{**span, "ph": "X", "pid": pids[span["pid"]]} for span in spans]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
