"""What the hypervisor says about the host and itself."""

from __future__ import annotations

from xenctypes import public
from xenctypes.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class PhysInfo(Record):
    """The host (xen_sysctl_physinfo, sysctl.h). Pages are of 4 KiB.

    ``capabilities`` is XEN_SYSCTL_PHYSCAP_*; ``hw_cap`` are CPUID words.
    """

    __slots__ = (
        "arch_capabilities",
        "capabilities",
        "cores_per_socket",
        "cpu_khz",
        "free_pages",
        "hw_cap",
        "max_cpu_id",
        "max_mfn",
        "max_node_id",
        "nr_cpus",
        "nr_nodes",
        "outstanding_pages",
        "scrub_pages",
        "threads_per_core",
        "total_pages",
    )
    threads_per_core: int
    cores_per_socket: int
    nr_cpus: int
    max_cpu_id: int
    nr_nodes: int
    max_node_id: int
    cpu_khz: int
    capabilities: int
    arch_capabilities: int
    total_pages: int
    free_pages: int
    scrub_pages: int
    outstanding_pages: int
    max_mfn: int
    hw_cap: tuple[int, ...]

    def __init__(self, raw: Any) -> None:
        """From a ``structs.xen_sysctl_physinfo``."""
        for name in self.__slots__:
            setattr(self, name, getattr(raw, name))
        self.hw_cap = tuple(raw.hw_cap)

    def virt_caps(self) -> list[str]:
        """The capabilities by the names that ``xl info`` prints."""
        return [name for bit, name in _PHYSCAPS.items() if self.capabilities & bit]


_PHYSCAPS = {
    public.XEN_SYSCTL_PHYSCAP_pv: "pv",
    public.XEN_SYSCTL_PHYSCAP_hvm: "hvm",
    public.XEN_SYSCTL_PHYSCAP_directio: "directio",
    public.XEN_SYSCTL_PHYSCAP_hap: "hap",
    public.XEN_SYSCTL_PHYSCAP_shadow: "shadow",
    public.XEN_SYSCTL_PHYSCAP_iommu_hap_pt_share: "iommu_hap_pt_share",
    public.XEN_SYSCTL_PHYSCAP_vmtrace: "vmtrace",
    public.XEN_SYSCTL_PHYSCAP_vpmu: "vpmu",
    public.XEN_SYSCTL_PHYSCAP_gnttab_v1: "gnttab-v1",
    public.XEN_SYSCTL_PHYSCAP_gnttab_v2: "gnttab-v2",
}


class XenVersion(Record):
    """The hypervisor (version.h). ``str()`` is its release, like "4.17.7".

    ``capabilities`` are the guest types it runs, separated by spaces.
    """

    __slots__ = (
        "build_id",
        "capabilities",
        "changeset",
        "commandline",
        "compile_by",
        "compile_date",
        "compile_domain",
        "compiler",
        "extra",
        "major",
        "minor",
        "pagesize",
        "virt_start",
    )
    major: int
    minor: int
    extra: str
    compiler: str
    compile_by: str
    compile_domain: str
    compile_date: str
    capabilities: str
    changeset: str
    commandline: str
    virt_start: int
    pagesize: int
    build_id: str

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}{self.extra}"
