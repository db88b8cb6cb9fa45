"""What `chaos profile` makes of the timings of many creates."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos import profiling
from chaos.schedule import Run
from chaos.steps import (
    DEVICES,
    EXECUTE,
    HYPERVISOR,
    IMAGE,
    PREPARE,
    TOOLSTACK,
    Timing,
    profile_of,
    spent,
)
from chaos.xllog import MIXED, XL

MS = 1_000_000
milliseconds = st.floats(0, 1e6, allow_nan=False)


def sample(base: int, load: float, ready: float | None, source: str = "warm") -> dict[str, Any]:
    """Two steps done ahead, a second earlier, and two while somebody waited."""
    ahead = base - 1000 * MS
    timings = [
        Timing("create domain", PREPARE, HYPERVISOR, ahead, 4 * MS),
        Timing("connect vifs", PREPARE, DEVICES, ahead + 4 * MS, 6 * MS),
        Timing("load image", EXECUTE, IMAGE, base, int(load * MS)),
        Timing("unpause", EXECUTE, HYPERVISOR, base + int(load * MS), MS),
    ]
    return {
        "name": "app", "domid": 3, "source": source, "caller_ms": load + 3,
        "profile": profile_of(spent(timings), ready),
    }  # fmt: skip


SAMPLES = [sample(10**12, 2, 5), sample(2 * 10**12, 4, 7), sample(3 * 10**12, 9, 8)]


def test_steps_have_their_place_and_their_time() -> None:
    rows = profiling.rows(SAMPLES)
    assert [(row["name"], row["start_ms"], row["median_ms"], row["p99_ms"]) for row in rows] == [
        ("create domain", 0, 4, 4),
        ("connect vifs", 4, 6, 6),
        ("load image", 0, 4, 9),
        ("unpause", 4, 1, 1),
        ("unpause to ready", 5, 7, 8),
    ]
    assert profiling.waterfall(rows) == [
        "█" * 16,
        " " * 16 + "█" * 24,
        "█" * 13,
        " " * 13 + "█" * 3,
        " " * 16 + "█" * 23,
    ]


def test_what_was_done_ahead_is_nobody_s_wait() -> None:
    found = profiling.categories(SAMPLES)
    assert {name: times["median_ms"] for name, times in found.items()} == {
        TOOLSTACK: 2, HYPERVISOR: 1, IMAGE: 4, profiling.BOOT: 7,
    }  # fmt: skip
    cold = profiling.categories([sample(10**12, 2, None, "cold") | {"caller_ms": 14.0}])
    assert {name: times["median_ms"] for name, times in cold.items()} == {
        TOOLSTACK: 1, HYPERVISOR: 5, DEVICES: 6, IMAGE: 2,
    }  # fmt: skip


def test_a_waterfall_begins_with_the_earliest_step() -> None:
    """The maker's image is loaded before the daemon's own steps, whatever their order."""
    one = sample(10**12, 2, None)
    one["profile"]["steps"].reverse()
    starts = {row["name"]: row["start_ms"] for row in profiling.rows([one])}
    assert starts == {"create domain": 0, "connect vifs": 4, "load image": 0, "unpause": 2}


def test_a_guest_that_says_nothing_has_no_boot() -> None:
    shown = profiling.summary([sample(10**12, 2, None), sample(10**12, 2, None, "cold")])
    assert shown["boot"] is None
    assert shown["sources"] == {"warm": 1, "cold": 1}
    assert shown["execute"] == {"median_ms": 3, "p99_ms": 3}
    assert [row["name"] for row in shown["steps"]][-1] == "unpause"


def test_a_trace_is_on_one_clock() -> None:
    events = profiling.trace(SAMPLES)["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 3 * 5
    assert {event["pid"] for event in spans} == {event["pid"] for event in events}
    load = next(event for event in spans if event["name"] == "load image" and event["tid"] == 2)
    assert (load["ts"], load["dur"], load["cat"]) == (2e9, 4000, IMAGE)
    boot = next(event for event in spans if event["pid"] == 3 and event["tid"] == 2)
    assert (boot["ts"], boot["dur"]) == (2e9 + 5000, 7000)


def test_processes_have_a_track_for_each_name() -> None:
    runs = [Run("noxsd", 7, 1, 50, 20), Run("chaosd", 8, 0, 55, 5), Run("noxsd", 7, 0, 90, 9)]
    events = profiling.trace(SAMPLES[:1], runs)["traceEvents"]
    names = {e["args"]["name"]: e["pid"] for e in events if e["ph"] == "M"}
    assert len(set(names.values())) == len(names) == 5
    spans = [e for e in events if e["pid"] == names["process noxsd"] and e["ph"] == "X"]
    assert [(e["ts"], e["dur"], e["tid"]) for e in spans] == [(50, 20, 7), (90, 9, 7)]


def test_against_another_toolstack() -> None:
    steps = [
        {"name": "a", "phase": XL, "category": "bus", "start_ns": 10, "ms": 30.0},
        {"name": "b", "phase": XL, "category": MIXED, "start_ns": 30 * MS, "ms": 10.0},
    ]
    other = {
        "name": "app", "domid": 4, "source": "xl", "caller_ms": 42.0, "logged_ms": 50.0,
        "profile": {"steps": steps, "ready_ms": None},
    }  # fmt: skip
    found = profiling.against([other], [7.0, 20.0, 8.0])
    assert (found["toolstack"], found["median_ms"], found["ratio"]) == ("xl", 42, 42 / 8)
    assert found["command"] == {"median_ms": 8, "p99_ms": 20}
    assert sum(times["median_ms"] for times in found["categories"].values()) == 40
    assert list(found["categories"]) == [MIXED, "bus"]
    spans = profiling.trace([*SAMPLES, other])["traceEvents"]
    assert [span["tid"] for span in spans if span["name"] == "b"] == [4]


@given(st.lists(milliseconds, min_size=1))
def test_quantiles_are_among_the_values(values: list[float]) -> None:
    times = profiling.spread(values)
    assert times["p99_ms"] in values
    assert min(values) <= times["median_ms"] <= times["p99_ms"] <= max(values)


@given(milliseconds, milliseconds, milliseconds)
def test_bars_stay_within_their_column(start: float, length: float, more: float) -> None:
    shown = profiling.bar(start, length, start + length + more)
    assert len(shown) <= profiling.WIDTH
    assert not shown or shown.strip() == shown.lstrip() != ""


@pytest.mark.parametrize(("count", "rank"), [(1, 0), (2, 1), (20, 19), (100, 98), (200, 197)])
def test_p99_is_the_nearest_rank(count: int, rank: int) -> None:
    assert profiling.spread(range(count))["p99_ms"] == rank


def test_the_median_of_two_is_between_them() -> None:
    assert profiling.spread([1.0, 3.0]) == {"median_ms": 2, "p99_ms": 3}
