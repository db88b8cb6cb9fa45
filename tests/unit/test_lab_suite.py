"""scripts/test, which runs the parts."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from lab import suite

TREE = Path(__file__).parents[2]
SCRIPT = """
from lab.suite import Part, _Runner, take_children_along
take_children_along()
tell = "import os; print('child', os.getpid(), flush=True); import time; time.sleep(1000)"
_Runner([Part("one", [{python!r}, "-c", tell])]).run(1)
"""


def test_who_ends_it_ends_its_parts() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(python=sys.executable)],
        cwd=TREE,
        stdout=subprocess.PIPE,
        text=True,
    ) as suite:
        assert suite.stdout is not None
        line = next(line for line in suite.stdout if line.startswith("child"))
        child = os.pidfd_open(int(line.split()[1]))
        suite.send_signal(signal.SIGTERM)
        assert suite.wait() == 128 + signal.SIGTERM
    assert select.select([child], [], [], 30)[0], "it runs on"
    os.close(child)


def test_the_bounds_come_last_and_alone() -> None:
    """A benchmark beside the unit tests would measure them."""
    parts = list(suite._parts(suite._parser().parse_args([])))
    assert parts[-1].name == "bench"
    assert parts[-1].boots
    assert parts[-1].command[:2] == ["scripts/bench", "--quick"]


def test_picked_tests_have_no_bounds() -> None:
    names = [part.name for part in suite._parts(suite._parser().parse_args(["-k", "x"]))]
    assert "bench" not in names
    (only,) = suite._parts(suite._parser().parse_args(["bench", "--debian", "13"]))
    assert only.command[-2:] == ["--debian", "13"]
