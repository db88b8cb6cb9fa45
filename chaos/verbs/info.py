"""info: the host and its hypervisor, under xl's names."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chaos import __version__

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.invocation import Invocation

PAGES_PER_MIB = 256


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("--json", action="store_true", help="print as JSON")


def run(call: Invocation) -> int:
    """Print one line a fact. Memory is in MiB, as xl info prints it."""
    ctrl = call.host.ctrl
    physinfo = ctrl.physinfo()
    version = ctrl.xen_version()
    host = os.uname()
    facts: dict[str, str | int] = {
        "host": host.nodename,
        "release": host.release,
        "version": host.version,
        "machine": host.machine,
        "nr_cpus": physinfo.nr_cpus,
        "max_cpu_id": physinfo.max_cpu_id,
        "nr_nodes": physinfo.nr_nodes,
        "cores_per_socket": physinfo.cores_per_socket,
        "threads_per_core": physinfo.threads_per_core,
        "cpu_mhz": f"{physinfo.cpu_khz / 1000:.3f}",
        "total_memory": physinfo.total_pages // PAGES_PER_MIB,
        "free_memory": (physinfo.free_pages - physinfo.outstanding_pages) // PAGES_PER_MIB,
        "outstanding_claims": physinfo.outstanding_pages // PAGES_PER_MIB,
        "xen_major": version.major,
        "xen_minor": version.minor,
        "xen_extra": version.extra,
        "xen_version": f"{version.major}.{version.minor}{version.extra}",
        "xen_caps": version.capabilities,
        "xen_scheduler": ctrl.sched_name(),
        "xen_pagesize": version.pagesize,
        "xen_changeset": version.changeset,
        "xen_commandline": version.commandline,
        "cc_compiler": version.compiler,
        "cc_compile_date": version.compile_date,
        "chaos_version": __version__,
    }
    if call.args.json:
        call.print_json(facts)
    else:
        call.print(*(f"{key:<23}: {value}" for key, value in facts.items()))
    return 0
