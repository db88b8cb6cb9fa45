"""chaos profile: cold, from the pool, and against xl."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from chaosd import DAYTIME, GUESTS, HELLO, NONE, running
from command import chaos

from chaos.client import Chaos

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
def test_from_the_pool(kind: str) -> None:
    with running(NONE):
        said = chaos("profile", DAYTIME, KERNEL, "-n", "3", f"--{kind}").stdout
        assert f"3 creates (3 {kind}); the caller waited" in said
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


@pytest.mark.xenstored
def test_against_xl(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    wanted = ["profile", HELLO, HELLO_KERNEL, "-n", "2", "--cold", "--against=xl"]
    shown = json.loads(chaos(*wanted, "--json", f"--trace={trace}").stdout)
    assert shown["against"]["ratio"] > 1
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
    assert "xl create took" in said


@pytest.mark.thorough
@pytest.mark.xenstored
def test_counted_against_xl() -> None:
    wanted = ["profile", HELLO, HELLO_KERNEL, "-n", "2", "--cold", "--against=xl"]
    counts = json.loads(chaos(*wanted, "--count", "--json").stdout)
    assert counts.keys() == {"cold", "xl"}
    for toolstack in counts.values():
        calls = {row["name"]: row for row in toolstack["hypercalls"]}
        assert calls["domctl createdomain"]["count"] == 1
        assert calls["domctl createdomain"]["ms"] > 0
        assert toolstack["frames_mapped"] > 20
    assert counts["xl"]["hypercalls_total"] > counts["cold"]["hypercalls_total"]
    assert counts["xl"]["system_calls"]["xl"]["ioctl"] > 0
