"""The daemons as systemd runs them: order, restarts, sandboxes, and guests that notice nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from daemons import end
from guest import pinging
from waiting import wait_for

from chaos import frames
from noxs import hotplug

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.systemd

DAEMONS = [name for name in ("noxsd", "xendevd", "storesd", "chaosd") if shutil.which(name)]
DAYTIME = "examples/daytime.cfg"
ADDRESS = "10.77.0.2"


def run(*command: str, status: int | None = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert status is None or done.returncode == status, (command, done.stdout, done.stderr)
    return done.stdout


def show(unit: str, name: str) -> str:
    return run("systemctl", "show", "-P", name, unit).strip()


def pid(unit: str) -> int:
    return int(show(unit, "MainPID"))


def active(unit: str, other_than: int = 0) -> int | None:
    """The unit's process once it has said that it is ready, if it is another than it was."""
    now = pid(unit)
    return now if show(unit, "ActiveState") == "active" and now not in {0, other_than} else None


def ping(count: int = 3) -> None:
    run("ping", "-q", "-c", str(count), "-i", "0.2", "-W", "5", ADDRESS)


@pytest.fixture
def guest() -> Iterator[str]:
    """A guest with a vif, which answers ping."""
    made = json.loads(run("chaos", "create", "--json", DAYTIME))
    ping()
    yield made["uuid"]
    run("chaos", "destroy", "daytime", status=None)


def create_with_a_vif() -> None:
    run("chaos", "create", "--json", DAYTIME)
    try:
        ping()
    finally:
        run("chaos", "destroy", "daytime")


def test_all_units_run() -> None:
    for name in DAEMONS:
        assert active(name), run("systemctl", "status", "--no-pager", name, status=None)
        assert show(name, "NRestarts") == "0"
        assert show(name, "SubState") == "running"
    assert run("systemctl", "is-enabled", *DAEMONS).split() == ["enabled"] * len(DAEMONS)
    assert hotplug.running()
    assert re.search(r"^chaos:", Path("/etc/group").read_text(), re.MULTILINE)


def test_they_started_in_order() -> None:
    ready = [int(show(name, "ActiveEnterTimestampMonotonic")) for name in DAEMONS]
    begun = [int(show(name, "ExecMainStartTimestampMonotonic")) for name in DAEMONS]
    order = dict(zip(DAEMONS, zip(ready, begun, strict=True), strict=True))
    for before, after in (("noxsd", "xendevd"), ("noxsd", "storesd"), ("xendevd", "chaosd"),
                          ("storesd", "chaosd")):  # fmt: skip
        assert order[before][0] <= order[after][1]
    assert run("systemctl", "show", "-P", "After", "xendevd").split().count("noxsd.service") == 1


def test_no_line_of_a_unit_is_complained_of() -> None:
    for name in DAEMONS:
        path = f"/etc/systemd/system/{name}.service"
        complaints = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", path],
            capture_output=True,
            text=True,
            check=False,
        )
        assert name not in complaints.stderr, complaints.stderr


def test_the_sandboxes_hold() -> None:
    status = {
        name: dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{pid(name)}/status").read_text().splitlines()
        )
        for name in DAEMONS
    }
    for name in DAEMONS:
        assert status[name]["NoNewPrivs"] == "1"
        assert status[name]["Seccomp"] == "2"
        # 10 is a daemon without any sandbox; docs/operations.md quotes the verdicts.
        run("systemd-analyze", "security", "--threshold=35", f"{name}.service")
    assert int(status["noxsd"]["CapEff"], 16) == 0
    assert "0" not in status["noxsd"]["Uid"].split()
    assert int(status["xendevd"]["CapBnd"], 16) == 1 << 12 | 1 << 1  # NET_ADMIN, DAC_OVERRIDE
    assert int(status["storesd"]["CapBnd"], 16) == 0


def test_a_guest_gets_a_disk_that_is_another_users(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 16))
    os.chown(image, 1234, 1234)
    image.chmod(0o600)
    disk = f"disk=['{image},raw,xvda,rw']"
    made = json.loads(run("chaos", "create", "--json", "examples/disk.cfg", disk))
    try:
        assert made["profile"]["ready_ms"]
        assert image.read_bytes().startswith(b"sector 0 of disk 51712")
    finally:
        run("chaos", "destroy", "disk")


@pytest.mark.parametrize("name", ["noxsd", "xendevd"])
def test_a_daemon_that_is_killed_comes_back(name: str, guest: str) -> None:
    before = pid(name)
    end(before, signal.SIGKILL)
    wait_for(lambda: active(name, before), f"{name} does not come back")
    assert show(name, "NRestarts") == "1"
    ping()
    run("chaos", "destroy", "daytime")
    create_with_a_vif()


@pytest.mark.parametrize("name", ["noxsd", "xendevd"])
def test_a_restart_disturbs_nobody(name: str, guest: str) -> None:
    others = {other: pid(other) for other in DAEMONS if other != name}
    before = pid(name)
    with pinging(ADDRESS):
        run("systemctl", "restart", name)
        assert active(name, before)
        ping()
    assert {other: pid(other) for other in others} == others
    listed = json.loads(run("chaos", "list", "--json", "daytime"))
    assert listed[0]["uuid"] == guest
    run("chaos", "destroy", "daytime")
    create_with_a_vif()


def test_stopped_and_started_again(guest: str) -> None:
    run("systemctl", "stop", *reversed(DAEMONS))
    ping()
    assert not hotplug.running()
    started = time.monotonic()
    run("systemctl", "start", DAEMONS[-1])  # pulls in the others
    assert time.monotonic() - started < 60
    for name in DAEMONS:
        wait_for(lambda name=name: active(name), f"{name} does not start")  # type: ignore[misc]
    run("chaos", "destroy", "daytime")
    create_with_a_vif()


@pytest.mark.skipif("chaosd" not in DAEMONS, reason="chaosd is not installed")
def test_chaosd_comes_and_goes_and_100_guests_run_on(guest: str) -> None:
    run("chaos", "create", "-q", "--count", "100", "examples/hello.cfg", 'name="many-{n}"')
    try:
        before = guests()
        assert len(before) == 101
        for how in ("restart", "kill"):
            old = pid("chaosd")
            with pinging(ADDRESS):
                if how == "restart":
                    run("systemctl", "restart", "chaosd")
                else:
                    end(old, signal.SIGKILL)
                wait_for(lambda old=old: active("chaosd", old), "chaosd does not come back")  # type: ignore[misc]
                ping()
            assert guests() == before
    finally:
        names = [f"many-{n}" for n in range(1, 101)]
        run("chaos", "destroy", *names, status=None)
    assert list(guests().values()) == [guest]


@pytest.mark.skipif("chaosd" not in DAEMONS, reason="chaosd is not installed")
def test_the_daemon_shuts_down_guests_whose_channels_it_holds() -> None:
    for name in ("one", "two"):
        settings = [f'name="{name}"', 'kernel="/src/guests/build/hello.elf"']
        wanted = {"path": "/src/examples/hello.cfg", "overrides": settings, "wait_ready": 60}
        assert ask_chaosd("create", wanted)["ready_ms"]
    try:
        told = ask_chaosd("shutdown", {"domains": ["one", "two"], "wait": True, "timeout": 60})
        assert [(one["name"], one["answered"], one["dead"]) for one in told] == [
            ("one", True, True),
            ("two", True, True),
        ]
        wait_for(lambda: not {"one", "two"} & guests().keys(), "on_poweroff is not obeyed")
    finally:
        run("chaos", "destroy", "one", "two", status=None)


def ask_chaosd(method: str, params: dict[str, Any]) -> Any:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(120)
        sock.connect("/run/chaos/chaosd.sock")
        sock.sendall(frames.pack_request(1, method, params))
        splitter = frames.Splitter()
        while True:
            for body in splitter.feed(sock.recv(1 << 16)):
                reply = frames.read_reply(body)
                assert reply.kind in {frames.OK, frames.PROGRESS}, reply
                if reply.kind == frames.OK:
                    return reply.value


def guests() -> dict[str, str]:
    """Names and UUIDs of the running domains that chaos made."""
    listed = json.loads(run("chaos", "list", "--json"))
    return {
        one["name"]: one["uuid"]
        for one in listed
        if one["made_by_chaos"] and one["shutdown_reason"] is None
    }
