"""What a create asks of the hypervisor and of the kernel, counted by tracing the whole host.

Counted are: hypercalls that programs make through privcmd, with their time (their names are those
of the public headers); frames of guests that they map; requests of Dom0's kernel to the bus;
system calls, by process and by kind; processes forked and programs run. What Dom0's kernel asks
of the hypervisor for itself, or for a driver's ioctl (event channels, grants), is not a program's
hypercall: those stand as ioctls.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from chaos.tracefs import probes, tracer
from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    Counts = dict[str, Any]

BUFFER_KB = 16384
"""For each processor; a create that fills it is refused, rather than counted in part."""

# xen.h; of the calls whose first argument is the sub-operation itself, or a pointer to it
HYPERCALLS = {
    1: "mmu_update", 7: "platform_op", 12: "memory_op", 13: "multicall", 17: "xen_version",
    18: "console_io", 20: "grant_table_op", 24: "vcpu_op", 26: "mmuext_op", 27: "xsm_op",
    29: "sched_op", 32: "event_channel_op", 33: "physdev_op", 34: "hvm_op", 35: "sysctl",
    36: "domctl", 41: "dm_op", 42: "hypfs_op", 48: "arch_0",
}  # fmt: skip
DIRECT = {"memory_op", "xen_version", "grant_table_op", "vcpu_op", "sched_op", "event_channel_op",
          "physdev_op", "hvm_op"}  # fmt: skip
POINTED = {"multicall", "sysctl", "domctl", "mmuext_op", "platform_op"}
OPERATIONS = {
    "multicall": HYPERCALLS,  # the first of them
    # domctl.h
    "domctl": {
        1: "createdomain", 2: "destroydomain", 3: "pausedomain", 4: "unpausedomain",
        5: "getdomaininfo", 9: "setvcpuaffinity", 10: "shadow_op", 11: "max_mem",
        12: "setvcpucontext", 13: "getvcpucontext", 14: "getvcpuinfo", 15: "max_vcpus",
        16: "scheduler_op", 17: "setdomainhandle", 19: "irq_permission", 20: "iomem_permission",
        21: "ioport_permission", 22: "hypercall_init", 24: "settimeoffset",
        25: "getvcpuaffinity", 34: "sethvmcontext", 33: "gethvmcontext", 35: "set_address_size",
        36: "get_address_size", 41: "set_target", 59: "gettscinfo", 60: "settscinfo",
        61: "getpageframeinfo3", 66: "set_virq_handler", 68: "setnodeaffinity",
        69: "getnodeaffinity", 74: "setvnumainfo", 82: "get_cpu_policy", 83: "set_cpu_policy",
    },
    # sysctl.h
    "sysctl": {
        3: "physinfo", 4: "sched_id", 6: "getdomaininfolist", 8: "getcpuinfo", 9: "availheap",
        16: "cputopoinfo", 17: "numainfo", 18: "cpupool_op", 19: "scheduler_op",
        25: "get_cpu_levelling_caps", 26: "get_cpu_featureset", 29: "get_cpu_policy",
    },
    # memory.h
    "memory_op": {
        0: "increase_reservation", 1: "decrease_reservation", 2: "maximum_ram_page",
        3: "current_reservation", 4: "maximum_reservation", 5: "machphys_mfn_list",
        6: "populate_physmap", 7: "add_to_physmap", 11: "exchange", 12: "machphys_mapping",
        13: "set_memory_map", 14: "maximum_gpfn", 24: "claim_pages", 28: "acquire_resource",
    },
    # event_channel.h
    "event_channel_op": {
        0: "bind_interdomain", 1: "bind_virq", 3: "close", 4: "send", 5: "status",
        6: "alloc_unbound", 9: "unmask",
    },
    # xen.h
    "mmuext_op": {
        0: "pin_l1_table", 1: "pin_l2_table", 2: "pin_l3_table", 3: "pin_l4_table",
        4: "unpin_table", 16: "clear_page", 17: "copy_page",
    },
    # grant_table.h
    "grant_table_op": {0: "map_grant_ref", 1: "unmap_grant_ref", 2: "setup_table", 5: "copy"},
    # version.h
    "xen_version": {
        0: "version", 1: "extraversion", 2: "compile_info", 3: "capabilities", 4: "changeset",
        5: "platform_parameters", 6: "get_features", 7: "pagesize", 9: "commandline",
        10: "build_id",
    },
    # hvm/hvm_op.h
    "hvm_op": {0: "set_param", 1: "get_param"},
}  # fmt: skip

# include/uapi/xen/privcmd.h
CALL, MAP, MAP_BATCH, MAP_BATCH_2, MAP_RESOURCE = 0x305000, 0x105002, 0x105003, 0x205004, 0x205007

# arch/x86/entry/syscalls/syscall_64.tbl
KINDS = {
    "memory": {9, 10, 11, 12, 25, 28, 149, 150, 151, 325},
    "processes": {56, 57, 58, 59, 60, 61, 62, 157, 158, 218, 231, 234, 247, 322, 435},
    "waiting": {7, 23, 24, 34, 35, 128, 130, 202, 230, 232, 270, 271, 281, 441},
    "sockets": {41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55, 288, 299, 307},
    "signals": {13, 14, 15, 131},
    "ioctl": {16},
    "clocks": {96, 201, 228, 229},
    "identity": {39, 95, 102, 104, 105, 106, 107, 108, 110, 111, 112, 186},
    "files": {0, 1, 2, 3, 4, 5, 6, 8, 17, 18, 19, 20, 21, 22, 32, 33, 72, 73, 74, 75, 77,
        78, 79, 80, 82, 83, 84, 86, 87, 88, 89, 90, 91, 92, 93, 217, 254, 257, 258, 260, 262,
        263, 264, 265, 266, 267, 268, 269, 292, 293, 295, 296, 316, 319, 332, 436, 437, 439},
}  # fmt: skip
KIND_OF = {number: kind for kind, numbers in KINDS.items() for number in numbers}
OTHERS = "others"

GROUP = f"chaos_{os.getpid()}"
MORE = " c=+u0(+u8(%dx)):u32 d=+u16(%dx):u64"
PROBES = (
    f"p:{GROUP}/call privcmd_ioctl command=%si:x32 a=+u0(%dx):u64 b=+u8(%dx):u64{MORE}",
    f"r:{GROUP}/back privcmd_ioctl",
)
# drivers/xen/xenbus/xenbus_xs.c: what sends all requests, as compilers call it, or most of them
BUS_FUNCTIONS = ("xs_send", "xs_send.isra.0", "xs_talkv")
EVENTS = ("raw_syscalls:sys_enter", "sched:sched_process_fork", "sched:sched_process_exec")

# kernel/trace/trace_output.c
LINE = re.compile(
    r"^ *(?P<comm>.*)-(?P<pid>\d+) +\[\d+\] +\S+ +(?P<s>\d+)\.(?P<us>\d{6}): "
    r"(?P<event>\w+)(?P<rest>.*)"
)
SYSTEM_CALL = re.compile(r": NR (\d+) ")
FIELDS = re.compile(r"(\w+)=(\w+)")
UNKNOWN = "<...>"  # the kernel has forgotten the thread's name


def count(lines: Iterable[str]) -> Counts:
    """The counts of a trace, from its text. Pure."""
    calls: dict[str, list[int]] = {}
    begun: dict[str, tuple[str, int]] = {}
    processes: dict[str, Counter[str]] = {}
    totals: Counter[str] = Counter()
    names: dict[str, str] = {}
    programs: Counter[str] = Counter()
    for line in lines:
        match = LINE.match(line)
        if match is None:
            continue
        event, rest, pid = match["event"], match["rest"], match["pid"]
        when = int(match["s"]) * 1_000_000 + int(match["us"])
        comm = names.get(pid, UNKNOWN) if match["comm"] == UNKNOWN else match["comm"]
        names[pid] = comm
        if event == "call":
            values = {key: int(value, 0) for key, value in FIELDS.findall(rest)}
            if values["command"] == CALL:
                begun[pid] = _name(values), when
            else:
                totals["mapped"] += _frames(values)
        elif event == "back" and pid in begun:
            name, start = begun.pop(pid)
            row = calls.setdefault(name, [0, 0])
            row[0] += 1
            row[1] += when - start
        elif event == "bus":
            totals["bus"] += 1
        elif event == "sched_process_fork":
            totals["forks"] += 1
        elif event == "sched_process_exec":
            programs[rest.partition("filename=")[2].partition(" ")[0]] += 1
        elif event == "sys_enter" and (number := SYSTEM_CALL.match(rest)):
            kind = KIND_OF.get(int(number[1]), OTHERS)
            processes.setdefault(comm, Counter())[kind] += 1
    return {
        "hypercalls": [
            {"name": name, "count": number, "ms": us / 1e3}
            for name, (number, us) in sorted(calls.items(), key=lambda row: -row[1][0])
        ],
        "hypercalls_total": sum(number for number, _ in calls.values()),
        "frames_mapped": totals["mapped"],
        "kernel_bus_requests": totals["bus"],
        "forks": totals["forks"],
        "programs": dict(programs.most_common()),
        "system_calls": {
            comm: dict(kinds.most_common())
            for comm, kinds in sorted(processes.items(), key=lambda row: -row[1].total())
        },
        "system_calls_total": sum(kinds.total() for kinds in processes.values()),
    }


def _name(values: dict[str, int]) -> str:
    """A hypercall's name with that of its operation, of struct privcmd_hypercall's fields."""
    number = values["a"]
    name = HYPERCALLS.get(number, f"hypercall {number}")
    if name in DIRECT:
        operation = values["b"]
    elif name in POINTED:
        operation = values["c"]
    else:
        return name
    return f"{name} {OPERATIONS.get(name, {}).get(operation, operation)}"


def _frames(values: dict[str, int]) -> int:
    """Frames that one of the ioctls maps."""
    if values["command"] in {MAP, MAP_BATCH, MAP_BATCH_2}:
        return values["a"] & 0xFFFFFFFF
    return values["d"] if values["command"] == MAP_RESOURCE else 0


def _probed(stack: contextlib.ExitStack, function: str) -> bool:
    """Count the calls of a function of the kernel's bus, if it has one of that name."""
    with contextlib.suppress(ChaosError):
        stack.enter_context(probes([f"p:{GROUP}/bus {function}"]))
        return True
    return False


@contextlib.contextmanager
def counter() -> Iterator[tuple[Callable[[], contextlib.AbstractContextManager[None]], Counts]]:
    """Yield a function and a dict: what happens within the function's contexts is counted there.

    Raises ChaosError where the kernel cannot be traced, or too much happens for its buffers.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(probes(PROBES))
        events = [*EVENTS, f"{GROUP}:*"]
        has_kernel = any(_probed(stack, function) for function in BUS_FUNCTIONS)
        found = stack.enter_context(tracer(events, BUFFER_KB))
        counts: Counts = {}

        @contextlib.contextmanager
        def watched() -> Iterator[None]:
            found.write("trace", "")
            found.switch(on=True)
            try:
                yield
            finally:
                found.switch(on=False)
            if lost := found.lost():
                raise ChaosError(f"{lost} events did not fit the kernel's buffers")
            counts.update(count(found.lines()))
            if not has_kernel:
                counts["kernel_bus_requests"] = None

        yield watched, counts
