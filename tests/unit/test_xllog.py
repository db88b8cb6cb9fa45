"""The steps of an `xl create`, from the lines of its log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chaos import xllog
from chaos.steps import BUS, CONFIG, DEVICES, HYPERVISOR, IMAGE, TOOLSTACK

MS = 1_000_000
# As Xen 4.17 wrote them for a guest with a vif, with other times; most of them are left out.
LOG = """\
12 libxl: debug: libxl_create.c:2081:do_domain_create: ao 0x55: create: how=(nil) callback=(nil)
14 libxl: detail: libxl_create.c:662:libxl__domain_make: passthrough: disabled
30 libxl: debug: libxl_create.c:1342:initiate_domain_create: Domain 7:running bootloader
31 libxl: debug: libxl_bootloader.c:417:libxl__bootloader_run: Domain 7:no bootloader configured
31 libxl: debug: libxl_event.c:863:libxl__ev_xswatch_deregister: watch w=0x5: deregister
35 domainbuilder: detail: xc_dom_allocate: cmdline="", features=""
36 domainbuilder: detail: xc_dom_parse_image: called
40 domainbuilder: detail: xc_dom_boot_mem_init: called
52 domainbuilder: detail: xc_dom_build_image: called
58 domainbuilder: detail: xc_dom_boot_image: called
66 domainbuilder: detail: xc_dom_release: called
90 libxl: debug: libxl_event.c:812:libxl__ev_xswatch_register: watch w=0x5 \
wpath=/local/domain/0/backend/vif/7/0/state token=3/0: register slotnum=3
95 libxl: debug: libxl_event.c:849:libxl__ev_xswatch_deregister: watch w=0x5 \
wpath=/local/domain/0/backend/vif/7/0/state token=3/0: deregister slotnum=3
180 libxl: debug: libxl_event.c:812:libxl__ev_xswatch_register: watch w=0x6 \
wpath=/local/domain/7/console/tty token=3/1: register slotnum=3
189 libxl: debug: libxl_event.c:2067:libxl__ao_complete: ao 0x55: complete, rc=0
190 libxl: debug: libxl_domain.c:704:libxl_domain_unpause: Domain 7:ao 0x56: create: how=(nil)
191 libxl: debug: libxl_event.c:2067:libxl__ao_complete: ao 0x56: complete, rc=0
192 libxl: debug: libxl_domain.c:712:libxl_domain_unpause: Domain 7:ao 0x56: inprogress: poller=0x57
194 xencall:buffer: debug: total allocations:108 total releases:108
"""


def stamped(log: str) -> list[tuple[int, str]]:
    rows = (line.partition(" ") for line in log.splitlines())
    return [(int(when) * MS, line) for when, _, line in rows]


def test_steps() -> None:
    steps = xllog.steps(stamped(LOG), 0, 200 * MS)
    assert [(step["category"], step["start_ns"] / MS, step["ms"]) for step in steps] == [
        (CONFIG, 0, 12),
        (xllog.MIXED, 12, 18),
        (xllog.MIXED, 30, 5),
        (IMAGE, 35, 5),
        (HYPERVISOR, 40, 12),
        (IMAGE, 52, 6),
        (HYPERVISOR, 58, 8),
        (BUS, 66, 24),
        (DEVICES, 90, 90),
        (BUS, 180, 10),
        (HYPERVISOR, 190, 2),
        (TOOLSTACK, 192, 8),
    ]


def test_a_mark_that_is_missing_has_no_step() -> None:
    without = [line for line in stamped(LOG) if "/vif/" not in line[1]]
    steps = xllog.steps(without, 0, 200 * MS)
    assert [(step["category"], step["ms"]) for step in steps][-4:] == [
        (BUS, 114), (BUS, 10), (HYPERVISOR, 2), (TOOLSTACK, 8),
    ]  # fmt: skip
    assert xllog.steps([], 5, 5 + MS) == [
        {"name": "start, configuration", "phase": xllog.XL, "category": CONFIG,
         "start_ns": 5, "ms": 1},
    ]  # fmt: skip


@given(st.permutations(LOG.splitlines()))
def test_steps_fill_the_time(lines: list[str]) -> None:
    log = [(when * MS, line) for when, line in enumerate(lines)]
    steps = xllog.steps(log, 0, 100 * MS)
    assert sum(step["ms"] for step in steps) == 100
    assert all(step["ms"] >= 0 for step in steps)
    names = [step["name"] for step in steps]
    assert len(names) == len(set(names))
