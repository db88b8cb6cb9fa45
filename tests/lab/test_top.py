"""top on real domains, as text, as JSON and on a terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import termios
from typing import TYPE_CHECKING

import command
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

HELLO = "examples/hello.cfg"
ADDRESS = "10.77.0.2"  # of examples/daytime.cfg
SPIN = 'kernel="guests/build/spin.elf"'


def chaos(*argv: str) -> str:
    return command.chaos(*argv).stdout


@pytest.fixture
def domains() -> Iterator[None]:
    chaos("create", "--json", HELLO, 'name="idle"')
    chaos("create", HELLO, 'name="busy"', SPIN)
    yield
    chaos("destroy", "idle", "busy")


@pytest.mark.usefixtures("domains")
def test_who_is_busy_shows() -> None:
    looks = [json.loads(line) for line in chaos("top", "--json", "-n2", "-d1").splitlines()]
    assert len(looks) == 2
    last = {one["name"]: one for one in looks[1]["domains"]}
    assert last["busy"]["cpu_percent"] > 20
    assert last["busy"]["cpu_percent"] > 2 * last["idle"]["cpu_percent"]
    assert last["idle"]["ready_ms"] > 0
    assert last["idle"]["uptime"] > 0
    assert last["Domain-0"]["uptime"] > last["idle"]["uptime"]
    header, *rows = chaos("top", "-d0.5", "--sort", "name").splitlines()
    assert header.split()[:3] == ["NAME", "ID", "STATE"]
    assert [row.split()[0] for row in rows] == ["Domain-0", "busy", "idle"]


@pytest.mark.usefixtures("network")
def test_bytes_of_a_vif() -> None:
    chaos("create", "examples/daytime.cfg", 'name="web"', "--json")
    try:
        before = usage_of("web")
        subprocess.run(["ping", "-c3", "-i0.2", "-s1000", ADDRESS], check=True, timeout=60)
        after = usage_of("web")
        assert int(str(after["rx"])) >= int(str(before["rx"])) + 3000
        assert int(str(after["tx"])) >= int(str(before["tx"])) + 3000
    finally:
        chaos("destroy", "web")


def usage_of(name: str) -> dict[str, object]:
    look = json.loads(chaos("top", "--json", "-d0.1"))
    return next(one for one in look["domains"] if one["name"] == name)


@pytest.mark.usefixtures("domains")
def test_a_terminal_is_left_as_it_was() -> None:
    for ending in (b"srq", b"\x03"):
        ours, theirs = pty.openpty()
        before = termios.tcgetattr(theirs)
        process = subprocess.Popen(
            ["setsid", "--ctty", "chaos", "top", "-d0.5"],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
        )
        shown = b""
        while b"busy" not in shown or b"idle" not in shown:
            shown += os.read(ours, 65536)
        os.write(ours, ending)
        while b"\x1b[?1049l" not in shown:  # out of the alternate screen
            shown += os.read(ours, 65536)
        assert process.wait(60) == 0, shown
        assert termios.tcgetattr(theirs) == before
        os.close(ours)
        os.close(theirs)
