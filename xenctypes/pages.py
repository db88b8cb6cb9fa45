"""Structures in the pages that guests share with Dom0 and the hypervisor.

Names and fields are those of the C headers (x86-64 only), checked as those of
``xenctypes.structs`` are. Where a later release appends a field, it is here:
in the pages of an earlier one its bytes are unused, and zero.
"""

from __future__ import annotations

from ctypes import (
    Structure,
    Union,
    c_char,
    c_int8,
    c_int16,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
)


class start_info_domU(Structure):
    """start_info.console.domU."""

    _fields_ = (("mfn", c_uint64), ("evtchn", c_uint32))


class start_info_dom0(Structure):
    """start_info.console.dom0."""

    _fields_ = (("info_off", c_uint32), ("info_size", c_uint32))


class start_info_console(Union):
    """start_info.console."""

    _fields_ = (("domU", start_info_domU), ("dom0", start_info_dom0))


class start_info(Structure):
    """xen.h: what a PV guest finds in its first register."""

    _fields_ = (
        ("magic", c_char * 32),
        ("nr_pages", c_uint64),
        ("shared_info", c_uint64),
        ("flags", c_uint32),
        ("store_mfn", c_uint64),
        ("store_evtchn", c_uint32),
        ("console", start_info_console),
        ("pt_base", c_uint64),
        ("nr_pt_frames", c_uint64),
        ("mfn_list", c_uint64),
        ("mod_start", c_uint64),
        ("mod_len", c_uint64),
        ("cmd_line", c_char * 1024),
        ("first_p2m_pfn", c_uint64),
        ("nr_p2m_frames", c_uint64),
    )


class arch_vcpu_info(Structure):
    """arch-x86/xen-x86_64.h."""

    _fields_ = (("cr2", c_uint64), ("pad", c_uint64))


class vcpu_time_info(Structure):
    """xen.h."""

    _fields_ = (
        ("version", c_uint32),
        ("pad0", c_uint32),
        ("tsc_timestamp", c_uint64),
        ("system_time", c_uint64),
        ("tsc_to_system_mul", c_uint32),
        ("tsc_shift", c_int8),
        ("flags", c_uint8),
        ("pad1", c_uint8 * 2),
    )


class vcpu_info(Structure):
    """xen.h."""

    _fields_ = (
        ("evtchn_upcall_pending", c_uint8),
        ("evtchn_upcall_mask", c_uint8),
        ("evtchn_pending_sel", c_uint64),
        ("arch", arch_vcpu_info),
        ("time", vcpu_time_info),
    )


class arch_shared_info(Structure):
    """arch-x86/xen.h."""

    _fields_ = (
        ("max_pfn", c_uint64),
        ("pfn_to_mfn_frame_list_list", c_uint64),
        ("nmi_reason", c_uint64),
        ("p2m_cr3", c_uint64),
        ("p2m_vaddr", c_uint64),
        ("p2m_generation", c_uint64),
    )


class shared_info(Structure):
    """xen.h: one page; 32 legacy vcpus, 4096 event channels of 2-level ABI."""

    _fields_ = (
        ("vcpu_info", vcpu_info * 32),
        ("evtchn_pending", c_uint64 * 64),
        ("evtchn_mask", c_uint64 * 64),
        ("wc_version", c_uint32),
        ("wc_sec", c_uint32),
        ("wc_nsec", c_uint32),
        ("wc_sec_hi", c_uint32),
        ("arch", arch_shared_info),
    )


class xencons_interface(Structure):
    """io/console.h; the byte ``connection`` exists since 4.21 and is 0 before."""

    _fields_ = (
        ("in", c_char * 1024),
        ("out", c_char * 2048),
        ("in_cons", c_uint32),
        ("in_prod", c_uint32),
        ("out_cons", c_uint32),
        ("out_prod", c_uint32),
        ("connection", c_uint8),
    )


class xenstore_domain_interface(Structure):
    """io/xs_wire.h; the word ``evtchn_port`` exists since 4.21 and is 0 before."""

    _fields_ = (
        ("req", c_char * 1024),
        ("rsp", c_char * 1024),
        ("req_cons", c_uint32),
        ("req_prod", c_uint32),
        ("rsp_cons", c_uint32),
        ("rsp_prod", c_uint32),
        ("server_features", c_uint32),
        ("connection", c_uint32),
        ("error", c_uint32),
        ("evtchn_port", c_uint32),
    )


class grant_entry_v1(Structure):
    """grant_table.h: 512 of them in a frame; frame is a gfn, a PV guest's mfn."""

    _fields_ = (("flags", c_uint16), ("domid", c_uint16), ("frame", c_uint32))


class sring(Structure):
    """io/ring.h: what precedes the entries in any shared ring."""

    _fields_ = (
        ("req_prod", c_uint32),
        ("req_event", c_uint32),
        ("rsp_prod", c_uint32),
        ("rsp_event", c_uint32),
        ("pad", c_uint8 * 48),
    )


class netif_tx_request(Structure):
    """io/netif.h: 256 of them in a ring of one page."""

    _fields_ = (
        ("gref", c_uint32),
        ("offset", c_uint16),
        ("flags", c_uint16),
        ("id", c_uint16),
        ("size", c_uint16),
    )


class netif_tx_response(Structure):
    """io/netif.h."""

    _fields_ = (("id", c_uint16), ("status", c_int16))


class netif_rx_request(Structure):
    """io/netif.h."""

    _fields_ = (("id", c_uint16), ("pad", c_uint16), ("gref", c_uint32))


class netif_rx_response(Structure):
    """io/netif.h."""

    _fields_ = (
        ("id", c_uint16),
        ("offset", c_uint16),
        ("flags", c_uint16),
        ("status", c_int16),
    )


class hvm_start_info(Structure):
    """arch-x86/hvm/start_info.h, version 1: what a PVH guest finds in %ebx."""

    _fields_ = (
        ("magic", c_uint32),
        ("version", c_uint32),
        ("flags", c_uint32),
        ("nr_modules", c_uint32),
        ("modlist_paddr", c_uint64),
        ("cmdline_paddr", c_uint64),
        ("rsdp_paddr", c_uint64),
        ("memmap_paddr", c_uint64),
        ("memmap_entries", c_uint32),
        ("reserved", c_uint32),
    )


class hvm_modlist_entry(Structure):
    """arch-x86/hvm/start_info.h."""

    _fields_ = (
        ("paddr", c_uint64),
        ("size", c_uint64),
        ("cmdline_paddr", c_uint64),
        ("reserved", c_uint64),
    )
