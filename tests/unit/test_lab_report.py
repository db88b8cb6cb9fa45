"""The report of scripts/bench, made of invented figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from lab import figures, plots, report
from lab.bounds import Bound
from lab.figures import Comparison, Row

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = {"cpu": "a cpu", "cpus": 2, "memory_mib": 24 << 10, "linux": "6.1", "qemu": "7.2"}
BOUND = Bound("a warm create", "warm/0vif/returned", "spawn/returned", 0.5, 0.3, "because")


def comparison(*, xenstored: bool) -> dict[str, Any]:
    rows = {
        "spawn/returned": [50.0, 60.0, 70.0],
        "warm/0vif/returned": [15.0, 15.0, 90.0],
        "warm/1vif/ping": [120.0],
        "crun/returned": [600.0],
        "command/0vif/returned": [30.0],
        "spawn/returnedx8": [240.0],
        "command/0vif/returnedx8": [120.0],
        "spawn/returned@100": [120.0],
        "command/0vif/returned@100": [60.0],
    }
    if xenstored:
        rows["xl/0vif/returned"] = [1200.0]
    growth = [(number, 10.0 + number / 10) for number in range(100)]
    return {
        "host": {
            "xen": "4.17.5", "linux": "6.1.0", "chaos": "1.0", "dom0_cpus": 2,
            "dom0_memory_mib": 1000, "packages": {"crun": "1.8"}, "xenstored": xenstored,
        },
        "rows": {name: [*enumerate(samples)] for name, samples in rows.items()},
        "growth": {"warm": growth, "xl": []},
        "categories": {"warm/0vif": [{"toolstack": 3.0, "hypervisor": 3.0}, {"toolstack": 9.0}]},
    }  # fmt: skip


def part(name: str, result: object) -> dict[str, Any]:
    return {
        "result": result, "seconds": 61, "date": "2026-01-02", "commit": "abc", "debian": "12",
        "machine": MACHINE, "command": f"scripts/lab run -- {name}", "options": {},
    }  # fmt: skip


def everything() -> dict[str, Any]:
    sizes = {
        "rows": {"spawn": {"1048576": {"median_ms": 50.0}}},
        "fits": {"warm": {"ms_per_mib": 0.1, "base_ms": 20.0, "r2": 0.9}},
        "over_spawn": {"warm": {"51200": 0.3, "67108864": 0.4}, "spawn": {"51200": 1.0}},
    }
    rounds = [
        {
            "guests": guests, "create": {"median_ms": 20.0 + guests / 1000},
            "shell": 30.0, "ready": {"median_ms": 3.0}, "calls": {"spawn": 50.0},
        }
        for guests in (100, 8000)
    ]  # fmt: skip
    density = {
        "rounds": {"tiny": rounds, "daytime": []},
        "per_guest": {
            "tiny": {"guest": 1024.0, "dom0_kernel": 12.5, "dom0_kernel_slab": 12.0, "files": 4.5}
        },
        "ping": {"asked": 1000, "answered": 999},
    }
    samples = [
        {"source": source, "caller_ms": 660.0, "logged_ms": 900.0, "profile": {"steps": [
            {"name": "store", "phase": "xl create", "category": "bus", "start_ns": 1, "ms": 900.0},
        ], "ready_ms": None}} for source in ("xl", "cold")
    ]  # fmt: skip
    return {
        "noxs": part("noxs", comparison(xenstored=False)),
        "xenstored": part("xenstored", comparison(xenstored=True)),
        "profile": part("profile", {"spawn": [50.0, 60.0, 70.0], "samples": {"1": samples}}),
        "sizes": part("sizes", sizes),
        "density": part("density", density),
    }


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("spawn/returned", Row("spawn")),
        ("warm/1vif/ping", Row("warm", 1, "ping")),
        ("xl-xendevd/1vif/readyx8@100", Row("xl-xendevd", 1, "ready", 8, 100)),
    ],
)
def test_names_of_rows(name: str, row: Row) -> None:
    assert Row.parse(name) == row
    assert row.name == name


@pytest.mark.parametrize("name", ["", "warm", "warm/vif/returned", "warm/0vif/returned@x"])
def test_no_names_of_rows(name: str) -> None:
    with pytest.raises(ValueError, match="no row"):
        Row.parse(name)


def test_multiples_are_of_as_many_processes_in_the_same_company() -> None:
    found = Comparison(comparison(xenstored=True))
    assert found.times(Row("warm", 0)) == 0.25
    assert found.times(Row("command", 0, at_once=8)) == 0.5
    assert found.times(Row("command", 0, guests=100)) == 0.5
    assert found.times(Row("command", 0, guests=1000)) is None
    assert found.levels() == [0, 100]


def test_what_grows() -> None:
    found = Comparison(comparison(xenstored=True))
    assert found.grown("warm") == pytest.approx((10.45, 19.45))
    assert found.grown("xl") is None
    assert figures.smooth([(0, 1.0), (1, 9.0), (2, 2.0), (3, 3.0)], 2) == [(0.5, 5.0), (2.5, 2.5)]


def test_a_category_that_a_sample_lacks_counts_as_nothing() -> None:
    found = Comparison(comparison(xenstored=True))
    assert found.category_medians("warm/0vif") == {"toolstack": 6.0, "hypervisor": 1.5}


def test_the_report() -> None:
    parts = everything()
    parts["sizes"]["note"] = "the lab was busy"
    text = report.render(parts, [BOUND], ["ends", "growth"])
    assert "sizes: the lab was busy\n" in text
    assert "2026-01-02" in text.partition("\n")[0]
    assert "| a warm create | 0.25x | 0.50x |" in text
    xl = next(line for line in text.splitlines() if line.startswith("| `xl create` | 0 |"))
    assert "**20.0x** (1,200 ms" in xl
    assert "(ends.svg)" in text
    assert "sizes.svg" not in text  # what was not drawn is not shown
    assert "8,000 guests `tiny`" in text
    assert "999 of 1000 guests" in text
    assert "| 1,024.0 | 12.5, of which slab 12.0 | 4.5 |" in text
    assert "| xl, 1 vif |  |  | 11.0x |" in text  # scaled to what it takes without its log
    assert "a warm shell, the last of 8,000 tiny | 0.56x |" in text
    assert "scripts/lab run -- density" in text
    assert "a cpu, 2 processors, 24 GiB" in text
    assert text.count("## ") == 8


def test_a_report_of_little() -> None:
    """A part that was not measured is not in the report, and nothing breaks."""
    for missing in everything():
        parts = everything()
        del parts[missing]
        text = report.render(parts, [BOUND], [])
        assert f"scripts/lab run -- {missing}\n" not in text
        only = report.render({missing: everything()[missing]}, [BOUND], [])
        assert f"scripts/lab run -- {missing}`" in only


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = plots.draw(everything(), tmp_path)
    assert first == ["ends", "growth", "figure-5", "sizes", "density"]
    before = {name: (tmp_path / f"{name}.svg").read_bytes() for name in first}
    assert plots.draw(everything(), tmp_path) == first
    for name, picture in before.items():
        assert (tmp_path / f"{name}.svg").read_bytes() == picture, f"{name} differs by itself"
        assert b"process" in picture  # the axis says what it counts
    assert b"the paper's LightVM" in before["growth"]
    assert plots.draw({"profile": everything()["profile"]}, tmp_path) == []


def test_colors() -> None:
    assert len(set(plots.PALETTE)) == len(plots.PALETTE) == len(set(plots.MARKS))
