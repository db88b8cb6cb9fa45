"""chaos profile, cold and from the pool."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from chaosd import GUESTS, NONE, running
from command import chaos

from chaos.client import Chaos

if TYPE_CHECKING:
    from pathlib import Path

DAYTIME = "/src/examples/daytime.cfg"
KERNEL = f'kernel="{GUESTS}/daytime.elf"'

pytestmark = pytest.mark.usefixtures("network", "nothing_left")


def test_cold(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    wanted = ["profile", DAYTIME, KERNEL, "-n", "3", "--json", f"--trace={trace}"]
    shown = json.loads(chaos(*wanted).stdout)
    assert shown["sources"] == {"cold": 3}
    assert {"hypervisor", "bus", "image", "guest boot"} <= shown["categories"].keys()
    assert shown["boot"]["median_ms"] > 0
    spans = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert {span["tid"] for span in spans} == {1, 2, 3}
    refused = chaos("profile", DAYTIME, KERNEL, "-n", "3", "--warm", check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize("kind", ["warm", "generic"])
def test_from_the_pool(kind: str) -> None:
    with running(NONE):
        said = chaos("profile", DAYTIME, KERNEL, "-n", "3", f"--{kind}").stdout
        assert f"3 creates (3 {kind}); the caller waited" in said
        with Chaos() as client:
            assert client.call("pool.list") == []
