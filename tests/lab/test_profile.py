"""chaos profile: cold, from the pool, and against xl."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from chaosd import DAYTIME, GUESTS, HELLO, NONE, running
from command import chaos

from chaos.client import Chaos
from chaos.steps import EXECUTE

if TYPE_CHECKING:
    from pathlib import Path

KERNEL = f'kernel="{GUESTS}/daytime.elf"'
HELLO_KERNEL = f'kernel="{GUESTS}/hello.elf"'

pytestmark = pytest.mark.usefixtures("network", "nothing_left")


def test_cold(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    wanted = ["profile", DAYTIME, KERNEL, "-n", "3", "--json", f"--trace={trace}"]
    shown = json.loads(chaos(*wanted).stdout)
    assert shown["sources"] == {"cold": 3}
    assert {"hypervisor", "bus", "image", "guest boot"} <= shown["categories"].keys()
    assert shown["boot"]["median_ms"] > 0
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X" and event["cat"] != "process"]
    assert {step["tid"] for step in steps} == {1, 2, 3}
    # The processes' clock is that of the steps: noxsd and xendevd ran while vifs were connected.
    names = {e["args"]["name"]: e["pid"] for e in events if e["ph"] == "M"}
    plugging = [step for step in steps if step["name"] == "connect vifs"]
    for name in ("noxsd", "xendevd"):
        runs = [e for e in events if e["pid"] == names[f"process {name}"] and e["ph"] == "X"]
        assert any(
            step["ts"] <= run["ts"] <= step["ts"] + step["dur"] for step in plugging for run in runs
        )
    for more, status in (("--warm", 1), ("--against=xl", 1), ("--plot=x.gif", 2)):
        refused = chaos("profile", DAYTIME, KERNEL, "-n", "3", more, check=False)
        assert refused.returncode == status, more
        assert refused.stderr.count("\n") == 1, refused.stderr


@pytest.mark.parametrize("kind", ["warm", "generic"])
def test_from_the_pool(kind: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    with running(NONE):
        wanted = ["profile", DAYTIME, KERNEL, f"--{kind}"]
        shown = json.loads(chaos(*wanted, "-n", "2", "--json", f"--trace={trace}").stdout)
        for step in shown["steps"]:
            if step["phase"] == EXECUTE:
                assert 0 <= step["start_ms"] <= shown["caller"]["median_ms"] * 2, step
        waited = [times for name, times in shown["categories"].items() if name != "guest boot"]
        assert sum(times["median_ms"] for times in waited) == pytest.approx(
            shown["caller"]["median_ms"]
        )
        # What a maker did is on the clock of all others: it had a processor meanwhile.
        events = json.loads(trace.read_text())["traceEvents"]
        steps = [event for event in events if event["ph"] == "X" and event["cat"] != "process"]
        runs = [event for event in events if event["ph"] == "X" and event["cat"] == "process"]
        populated = next(step for step in steps if step["name"] == "populate")
        assert any(
            run["ts"] < populated["ts"] + populated["dur"]
            and populated["ts"] < run["ts"] + run["dur"]
            for run in runs
        )
        said = chaos(*wanted, "-n", "1").stdout
        assert f"1 creates (1 {kind}); the caller waited" in said
        with Chaos() as client:
            assert client.call("pool.list") == []


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["warm", "generic"])
def test_counted_from_the_pool(kind: str) -> None:
    with running(NONE):
        wanted = ("profile", DAYTIME, KERNEL, "--count", f"--{kind}")
        counts = json.loads(chaos(*wanted, "--json").stdout)[kind]
        calls = {row["name"]: row["count"] for row in counts["hypercalls"]}
        assert calls["domctl unpausedomain"] == 1
        assert counts["system_calls"]["chaosd"]["sockets"] > 0
        assert counts["bus_requests_total"] == 0


@pytest.mark.thorough
def test_counted_cold_with_a_vif() -> None:
    counts = json.loads(chaos("profile", DAYTIME, KERNEL, "--count", "--cold", "--json").stdout)
    asked = counts["cold"]["bus_requests"]
    assert asked["WRITE"] > 10
    assert asked["TRANSACTION_START"] >= 1
    assert sum(asked.values()) == counts["cold"]["bus_requests_total"]
    assert counts["cold"]["kernel_bus_requests"] > 5


@pytest.mark.xenstored
def test_against_xl(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    wanted = ["profile", HELLO, HELLO_KERNEL, "-n", "2", "--cold", "--against=xl"]
    shown = json.loads(chaos(*wanted, "--json", f"--trace={trace}").stdout)
    assert shown["against"]["ratio"] > 0
    assert shown["against"]["median_ms"] > shown["caller"]["median_ms"]
    assert shown["against"]["command"]["median_ms"] > shown["caller"]["median_ms"]
    for category in ("configuration", "hypervisor or bus", "hypervisor", "bus", "image"):
        assert shown["against"]["categories"][category]["median_ms"] > 0
    xl = [sample for sample in shown["samples"] if sample["source"] == "xl"]
    assert len(xl) == 2
    assert all(sample["domid"] > 0 for sample in xl)
    for sample in xl:
        whole = sum(step["ms"] for step in sample["profile"]["steps"])
        assert whole == pytest.approx(sample["logged_ms"])
    events = json.loads(trace.read_text())["traceEvents"]
    tracks = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"process xl", "process xenstored", "xl create, by its log"} <= tracks
    said = chaos("profile", DAYTIME, KERNEL, "-n", "1", "--cold", "--against=xl").stdout
    assert "devices, hotplug" in said
    assert "`xl create` took" in said
    assert "`chaos --no-daemon create`" in said


@pytest.mark.thorough
@pytest.mark.xenstored
def test_counted_against_xl() -> None:
    wanted = ["profile", HELLO, HELLO_KERNEL, "--cold", "--against=xl"]
    counts = json.loads(chaos(*wanted, "--count", "--json").stdout)
    assert counts.keys() == {"cold", "chaos --no-daemon create", "xl"}
    for toolstack in counts.values():
        calls = {row["name"]: row for row in toolstack["hypercalls"]}
        assert calls["domctl createdomain"]["count"] == 1
        assert calls["domctl createdomain"]["ms"] > 0
        assert toolstack["frames_mapped"] > 20
    assert counts["xl"]["hypercalls_total"] > counts["cold"]["hypercalls_total"]
    assert counts["xl"]["bus_requests"]["WRITE"] > 10
    assert counts["xl"]["bus_requests_total"] > counts["cold"]["bus_requests_total"]
    assert counts["xl"]["system_calls"]["xl"]["ioctl"] > 0
