"""What a PVH domain has and a PV one has not: a container, a memory map, emulated page tables.

Guest-physical memory of ``memory`` MiB::

    0 ........ low end   0xfc000000   0xfee00000   0xfeff8000    4 GiB ........
    RAM                  ACPI tables  local APIC   console,      RAM that the
    (image, modules,                               store and     hole displaced
    toolstack's pages at its end)                  other pages

The layout is libxl's (libxl__build_hvm and domain_construct_memmap), which guests are tested with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xenctypes.errors import XenError
from xenctypes.public import (
    HVM_PARAM_TIMER_MODE,
    X86_HVM_END_SPECIAL_REGION,
    X86_HVM_NR_SPECIAL_PAGES,
    XC_PAGE_SHIFT,
    XC_PAGE_SIZE,
    XEN_HVM_MEMMAP_TYPE_ACPI,
    XEN_HVM_MEMMAP_TYPE_RAM,
    XEN_HVM_MEMMAP_TYPE_RESERVED,
    HVMPTM_no_delay_for_missed_ticks,
    XEN_DOMCTL_CDF_hap,
    XEN_DOMCTL_CDF_hvm,
)

if TYPE_CHECKING:
    from collections.abc import Container

    from chaos.domconfig import DomainConfig
    from xenctypes.ctrl import Xenctrl

HOLE = ACPI_ADDRESS = 0xFC000000  # ACPI_INFO_PHYSICAL_ADDRESS, tools/libacpi/libacpi.h
GIB_4 = 1 << 32
ACPI_SIZE = XC_PAGE_SIZE
VCPU_PAGES = 256  # libxl__get_required_paging_memory: for each vCPU
HAP_PAGES_PER_MIB, SHADOW_PAGES_PER_MIB = 1, 2


def low_pages(mib: int) -> int:
    """How many of a guest's pages lie below the hole: all of them in most guests."""
    return min(mib << 20, HOLE) >> XC_PAGE_SHIFT


def high_end(mib: int) -> int:
    """Where memory above 4 GiB ends, in bytes; 0 if there is none."""
    size = mib << 20
    return GIB_4 + size - HOLE if size > HOLE else 0


def memory_map(mib: int) -> list[tuple[int, int, int]]:
    """The map that the guest is shown: (address, bytes, XEN_HVM_MEMMAP_TYPE_*), in order."""
    special = X86_HVM_NR_SPECIAL_PAGES << XC_PAGE_SHIFT
    end = X86_HVM_END_SPECIAL_REGION << XC_PAGE_SHIFT
    ranges = [
        (0, low_pages(mib) << XC_PAGE_SHIFT, XEN_HVM_MEMMAP_TYPE_RAM),
        (ACPI_ADDRESS, ACPI_SIZE, XEN_HVM_MEMMAP_TYPE_ACPI),
        (end - special, special, XEN_HVM_MEMMAP_TYPE_RESERVED),
    ]
    if high_end(mib):
        ranges.append((GIB_4, high_end(mib) - GIB_4, XEN_HVM_MEMMAP_TYPE_RAM))
    return ranges


def flags(kind: str, caps: Container[str]) -> int:
    """XEN_DOMCTL_CDF_* for a domain of type ``kind`` on a host that has ``caps``.

    ``caps`` are PhysInfo.virt_caps(). Raises XenError when the host has no such domains.
    """
    if kind == "pv":
        if "pv" not in caps:
            raise XenError("this hypervisor runs no PV guests", hint='type = "pvh" may do')
        return 0
    if "hvm" not in caps:
        raise XenError(
            "this host runs no PVH guests: its hypervisor found no hardware virtualisation",
            hint='type = "pv" needs none; else enable VT-x or AMD-V in the firmware',
        )
    if "hap" in caps:
        return XEN_DOMCTL_CDF_hvm | XEN_DOMCTL_CDF_hap
    if "shadow" not in caps:
        raise XenError(
            "this host runs no PVH guests: it has neither nested nor shadow paging",
            hint='type = "pv" needs neither',
        )
    return XEN_DOMCTL_CDF_hvm


def paging_bytes(config: DomainConfig, *, hap: bool) -> int:
    """Memory for Xen's page tables of a guest, beside the guest's own."""
    per_mib = HAP_PAGES_PER_MIB if hap else SHADOW_PAGES_PER_MIB
    return (VCPU_PAGES * config.maxvcpus + per_mib * config.maxmem) << XC_PAGE_SHIFT


def describe_vcpus(ctrl: Xenctrl, domid: int) -> None:
    """What CPUID says of fresh vcpus, local APICs as in chaos.acpi, and how these tick."""
    ctrl.cpuid_apply_policy(domid)
    ctrl.hvm_param_set(domid, HVM_PARAM_TIMER_MODE, HVMPTM_no_delay_for_missed_ticks)
