"""What a create asks for, from the text of a trace."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos import buscount, counting, countview, tracefs
from xenctypes.errors import ChaosError

PROBE = "(privcmd_ioctl+0x0/0x9d0 [xen_privcmd])"
BACK = "(__x64_sys_ioctl+0x8b/0xc0 <- privcmd_ioctl)"
TRACE = f"""\
# tracer: nop
            xl-12      [000] .....    10.000100: sys_enter: NR 16 (4, 305000, 7ffd, 0, 0, 0)
            xl-12      [000] d....    10.000110: call: {PROBE} command=0x305000 a=36 b=9 c=1 d=0
         xl -x-13      [001] d....    10.000120: call: {PROBE} command=0x305000 a=12 b=6 c=0 d=0
            xl-12      [000] d....    10.001110: back: {BACK}
         xl -x-13      [001] d....    10.000320: back: {BACK}
            xl-12      [000] d....    10.002000: call: {PROBE} command=0x205004 a=30064771175 b=0 \
c=0 d=0
            xl-12      [000] d....    10.002010: back: {BACK}
            xl-12      [000] d....    10.002020: call: {PROBE} command=0x205007 a=1 b=0 c=0 d=4
            xl-12      [000] d....    10.002030: call: {PROBE} command=0x305000 a=99 b=6 c=0 d=0
            xl-12      [000] d....    10.002040: back: {BACK}
       xenwatch-30     [000] d....    10.002100: bus: (xs_send+0x0/0x1a0)
            xl-12      [000] .....    10.003000: sched_process_fork: comm=xl pid=12 child_comm=xl \
child_pid=40
             xl-40     [001] .....    10.004000: sched_process_exec: filename=/bin/sh pid=40 \
old_pid=40
             sh-40     [001] .....    10.004100: sys_enter: NR 257 (ffffff9c, 7f, 0, 0, 0, 0)
          <...>-40     [001] .....    10.004200: sys_enter: NR 9999 (1, 0, 0, 0, 0, 0)
          <...>-41     [001] .....    10.004300: sys_enter: NR 9 (0, 0, 0, 0, 0, 0)
"""


def test_counts() -> None:
    found = counting.count(TRACE.splitlines())
    assert found == {
        "hypercalls": [
            {"name": "domctl createdomain", "count": 1, "ms": 1.0},
            {"name": "memory_op populate_physmap", "count": 1, "ms": 0.2},
            {"name": "hypercall 99", "count": 1, "ms": 0.01},
        ],
        "hypercalls_total": 3,
        "frames_mapped": 0x67 + 4,
        "kernel_bus_requests": 1,
        "forks": 1,
        "programs": {"/bin/sh": 1},
        "system_calls": {
            "sh": {"files": 1, "others": 1},
            "xl": {"ioctl": 1},
            "<...>": {"memory": 1},
        },
        "system_calls_total": 4,
    }


def test_a_table_of_two() -> None:
    found = counting.count(TRACE.splitlines())
    lines = countview.lines({"warm": counting.count([]), "xl": found})
    assert lines[0].split() == ["warm", "xl"]
    assert next(line for line in lines if line.startswith("requests to the bus")).split()[4:] == [
        "-", "-",
    ]  # fmt: skip
    assert "REQUESTS TO THE BUS" not in lines
    mapped = next(line for line in lines if line.startswith("guest frames mapped"))
    assert mapped.split() == ["guest", "frames", "mapped", "0", "107"]
    assert lines[lines.index("PROGRAMS RUN") + 1].split() == ["/bin/sh", "-", "1"]
    assert next(line for line in lines if "createdomain" in line).split() == [
        "domctl", "createdomain", "-", "1", "1.000",
    ]  # fmt: skip


def test_requests_have_their_names() -> None:
    counts = counting.count([]) | {"bus_requests": {"WRITE": 12}, "bus_requests_total": 12}
    lines = countview.lines({"xl": counts})
    assert lines[lines.index("REQUESTS TO THE BUS") + 1].split() == ["WRITE", "12"]


LOG = """\

***
OUT 0x55d01c0 20261122 14:20:01 CONTROL (OK )
IN 0x55d01c0 20261122 14:20:01 READ (/local/domain/1 )
OUT 0x55d01c0 20261122 14:20:01 READ (web )
io: IN 0x55d02a0 20261122 14:20:01 TRANSACTION_START ( )
io: IN 0x55d02a0 20261122 14:20:01 READ (/local/domain/1/name )
IN 0x55d01c0 20261122 14:20:02 CONTROL (log off )
"""


def test_xenstored_s_log_is_read() -> None:
    assert buscount.read_log(LOG.splitlines()) == {"READ": 2, "TRANSACTION_START": 1}


@given(st.lists(st.sampled_from(TRACE.splitlines()) | st.text()))
def test_anything_is_counted(lines: list[str]) -> None:
    countview.lines({"a": counting.count(lines)})


def test_a_kernel_that_does_not_let_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracefs, "TRACEFS", "/nowhere")
    with pytest.raises(ChaosError, match="cannot be traced: No such file"), counting.counter():
        pass
