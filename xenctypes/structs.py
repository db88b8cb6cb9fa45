"""Structures that the hypervisor and its libraries take and give.

Names and fields are those of the C headers (x86-64 only). Classes whose layout
depends on the release carry the first release that uses it in their name;
``xenctypes.releases`` says which one to take. ``tests/unit`` compares size and
offsets with a C probe compiled against the installed headers, and with a table
made from the headers of the other releases.

Those of pages shared with guests are in ``xenctypes.pages``.
"""

from __future__ import annotations

from ctypes import (
    Structure,
    Union,
    c_char,
    c_int32,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
)

xen_domain_handle_t = c_uint8 * 16


# domctl.h and sysctl.h: the control interface


class xen_arch_domainconfig(Structure):
    """arch-x86/xen.h."""

    _fields_ = (("emulation_flags", c_uint32), ("misc_flags", c_uint32))


_CREATE_HEAD = (
    ("ssidref", c_uint32),
    ("handle", xen_domain_handle_t),
    ("flags", c_uint32),
    ("iommu_opts", c_uint32),
    ("max_vcpus", c_uint32),
    ("max_evtchn_port", c_uint32),
    ("max_grant_frames", c_int32),
    ("max_maptrack_frames", c_int32),
    ("grant_opts", c_uint32),
)
_CREATE_TAIL = (
    ("vmtrace_size", c_uint32),
    ("cpupool_id", c_uint32),
    ("arch", xen_arch_domainconfig),
)


class xen_domctl_createdomain_4_17(Structure):
    """domctl.h of 4.17 and 4.18."""

    _fields_ = _CREATE_HEAD + _CREATE_TAIL


class xen_domctl_createdomain_4_19(Structure):
    """domctl.h since 4.19, which added altp2m_opts.

    4.21 splits that field into two of 16 bits, in the same place.
    """

    _fields_ = (*_CREATE_HEAD, ("altp2m_opts", c_uint32), *_CREATE_TAIL)


class xen_domctl_getdomaininfo(Structure):
    """domctl.h; libxenctrl calls it xc_domaininfo_t. Pages are of 4 KiB."""

    _fields_ = (
        ("domain", c_uint16),
        ("pad1", c_uint16),
        ("flags", c_uint32),
        ("tot_pages", c_uint64),
        ("max_pages", c_uint64),
        ("outstanding_pages", c_uint64),
        ("shr_pages", c_uint64),
        ("paged_pages", c_uint64),
        ("shared_info_frame", c_uint64),
        ("cpu_time", c_uint64),
        ("nr_online_vcpus", c_uint32),
        ("max_vcpu_id", c_uint32),
        ("ssidref", c_uint32),
        ("handle", xen_domain_handle_t),
        ("cpupool", c_uint32),
        ("gpaddr_bits", c_uint8),
        ("pad2", c_uint8 * 7),
        ("arch_config", xen_arch_domainconfig),
    )


class xen_domctl_getvcpuinfo(Structure):
    """domctl.h; cpu_time is in nanoseconds."""

    _fields_ = (
        ("vcpu", c_uint32),
        ("online", c_uint8),
        ("blocked", c_uint8),
        ("running", c_uint8),
        ("cpu_time", c_uint64),
        ("cpu", c_uint32),
    )


class xen_sysctl_physinfo(Structure):
    """sysctl.h; libxenctrl calls it xc_physinfo_t. Pages are of 4 KiB."""

    _fields_ = (
        ("threads_per_core", c_uint32),
        ("cores_per_socket", c_uint32),
        ("nr_cpus", c_uint32),
        ("max_cpu_id", c_uint32),
        ("nr_nodes", c_uint32),
        ("max_node_id", c_uint32),
        ("cpu_khz", c_uint32),
        ("capabilities", c_uint32),
        ("arch_capabilities", c_uint32),
        ("pad", c_uint32),
        ("total_pages", c_uint64),
        ("free_pages", c_uint64),
        ("scrub_pages", c_uint64),
        ("outstanding_pages", c_uint64),
        ("max_mfn", c_uint64),
        ("hw_cap", c_uint32 * 8),
    )


class xen_compile_info(Structure):
    """version.h."""

    _fields_ = (
        ("compiler", c_char * 64),
        ("compile_by", c_char * 16),
        ("compile_domain", c_char * 32),
        ("compile_date", c_char * 32),
    )


# memory.h


class e820entry(Structure):
    """A range of a domain's memory map, in bytes (xenctrl.h); ``type`` is XEN_HVM_MEMMAP_TYPE_*."""

    _pack_ = 1
    _fields_ = (("addr", c_uint64), ("size", c_uint64), ("type", c_uint32))


# event_channel.h


class evtchn_status_interdomain(Structure):
    """evtchn_status.u.interdomain; its first field is u.unbound.dom too."""

    _fields_ = (("dom", c_uint16), ("port", c_uint32))


class evtchn_status_u(Union):
    """evtchn_status.u."""

    _fields_ = (
        ("interdomain", evtchn_status_interdomain),
        ("pirq", c_uint32),
        ("virq", c_uint32),
    )


class evtchn_status(Structure):
    """event_channel.h; libxenctrl calls it xc_evtchn_status_t."""

    _fields_ = (
        ("dom", c_uint16),
        ("port", c_uint32),
        ("status", c_uint32),
        ("vcpu", c_uint32),
        ("u", evtchn_status_u),
    )
