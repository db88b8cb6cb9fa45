"""Which processes ran when, from the text of a trace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos import schedule, tracefs
from chaos.schedule import Run
from xenctypes.errors import ChaosError

TRACE = """\
# tracer: nop
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
          <idle>-0       [001] d..2.   100.000010: sched_switch: prev_comm=swapper/1 prev_pid=0 \
prev_prio=120 prev_state=R ==> next_comm=noxsd next_pid=40 next_prio=120
    chaos-python-7       [000] d..2.   100.000020: sched_switch: prev_comm=chaos-python prev_pid=7 \
prev_prio=120 prev_state=S ==> next_comm=a [b] => c next_pid=9 next_prio=120
           noxsd-40      [001] d..2.   100.000150: sched_switch: prev_comm=noxsd prev_pid=40 \
prev_prio=120 prev_state=S ==> next_comm=xl next_pid=41 next_prio=120
       a [b] => c-9      [000] d..2.   100.000160: sched_switch: prev_comm=a [b] => c prev_pid=9 \
prev_prio=120 prev_state=R+ ==> next_comm=chaos-python next_pid=7 next_prio=120
    chaos-python-7       [000] d..2.   101.000000: sched_switch: prev_comm=chaos-python prev_pid=7 \
prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120
"""


def test_runs() -> None:
    found = schedule.runs(TRACE.splitlines(), lambda name: not name.startswith("swapper"))
    assert found == [
        Run("noxsd", 40, 1, 100_000_010, 140),
        Run("a [b] => c", 9, 0, 100_000_020, 140),
        Run("chaos-python", 7, 0, 100_000_160, 999_840),
    ]
    assert schedule.runs(TRACE.splitlines(), "noxsd".__eq__) == found[:1]


def test_lost_events_make_no_runs() -> None:
    lines = TRACE.splitlines()
    assert all(run.name != "noxsd" for run in schedule.runs([*lines[:2], *lines[3:]], bool))


@given(st.lists(st.sampled_from(TRACE.splitlines()) | st.text()))
def test_anything_is_read(lines: list[str]) -> None:
    schedule.runs(lines, bool)


def test_a_kernel_that_does_not_let_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracefs, "TRACEFS", "/nowhere")
    with pytest.raises(ChaosError, match="cannot be traced: No such file"), schedule.recorded():
        pass
