"""The steps of an `xl create`, told from when the lines of its verbose log arrive. Pure.

xl's own time stamps are whole seconds (xtl_logger_stdio.c), but every line is flushed when it is
written: whoever reads them from a pipe knows when. Between two lines lies what xl did from
one to the other, so its steps are as fine as its log; what one of them mixes is said in its
category. The lines are those of libxl and libxenguest, Xen 4.17 to 4.20.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from chaos.steps import BUS, CONFIG, DEVICES, HYPERVISOR, IMAGE, TOOLSTACK

if TYPE_CHECKING:
    from collections.abc import Iterable

XL = "xl create"
MIXED = "hypervisor or bus"
"""What the log does not tell apart: hypercalls and requests to XenStore between two lines."""


class Mark(NamedTuple):
    """A line that begins a step."""

    line: re.Pattern[str]
    name: str
    category: str


FIRST = ("start, configuration", CONFIG)
MARKS = tuple(
    Mark(re.compile(line), name, category)
    for line, name, category in (
        # libxl_create.c: do_domain_create, initiate_domain_create
        (r"do_domain_create: ao \S+ create:", "domain and its nodes", MIXED),
        (r"running bootloader", "limits, channels", MIXED),
        # xg_dom_core.c, xg_dom_boot.c
        (r"xc_dom_allocate: ", "open and parse the image", IMAGE),
        (r"xc_dom_boot_mem_init: called", "populate memory", HYPERVISOR),
        (r"xc_dom_build_image: called", "load the image", IMAGE),
        (r"xc_dom_boot_image: called", "page tables, vCPU", HYPERVISOR),
        (r"xc_dom_release: called", "store nodes, introduce", BUS),
        # libxl_event.c: the first watch of a back end's state, and that of the console's
        (r"wpath=/local/domain/\d+/backend/\S+ \S+ register slotnum", "devices, hotplug", DEVICES),
        (r"wpath=/local/domain/\d+/console/tty \S+ register slotnum", "xenconsoled", BUS),
        # libxl_domain.c
        (r"libxl_domain_unpause: .*create:", "unpause", HYPERVISOR),
        (r"libxl_domain_unpause: .*inprogress:", "end of xl", TOOLSTACK),
    )
)


def steps(stamped: Iterable[tuple[int, str]], start: int, end: int) -> list[dict[str, Any]]:
    """The steps of a create that took from ``start`` to ``end``, as those of a profile.

    ``stamped``: the log's lines, each with when it arrived; all in nanoseconds of one clock.
    A mark that does not come has no step: its time is that of the step before.
    """
    begun = [(start, *FIRST)]
    later = 0
    for when, line in stamped:
        for index in range(later, len(MARKS)):
            if MARKS[index].line.search(line):
                begun.append((when, MARKS[index].name, MARKS[index].category))
                later = index + 1
                break
    ends = [when for when, _, _ in begun[1:]] + [end]
    return [
        {
            "name": name,
            "phase": XL,
            "category": category,
            "start_ns": when,
            "ms": (until - when) / 1e6,
        }
        for (when, name, category), until in zip(begun, ends, strict=True)
    ]
