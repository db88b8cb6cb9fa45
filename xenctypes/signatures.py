"""The C functions that we call, as data.

A signature is a row (checker, argument types...). The checker says what the
function returns and what of that is a failure; ``xenctypes.loader`` turns rows
into prototypes. Sources: xenctrl.h, xenguest.h and the stable libraries'
headers in ``tools/include``. Every row exists in every release that
``xenctypes.releases`` lists.
"""

from __future__ import annotations

from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_int,
    c_int32,
    c_long,
    c_size_t,
    c_uint,
    c_uint32,
    c_uint64,
    c_ulong,
    c_void_p,
    get_errno,
)

from xenctypes.errors import CallFailed
from xenctypes.public import DOMID_IDLE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from xenctypes.toollog import ToolLog

    Checker = tuple[Any, Callable[[Any, Any, tuple[Any, ...]], Any] | None]
    Row = tuple[Any, ...]

EPERM, EACCES = 1, 13


# Types


class Opaque(c_void_p):
    """A pointer to something only its library knows.

    One subclass per C type: ctypes refuses one in place of another. ``log`` is
    where the library's messages about it go, for the errors raised here.
    """

    log: ToolLog | None = None


class xentoollog_logger(Opaque):
    """xentoollog.h."""


class xentoollog_logger_stdiostream(xentoollog_logger):
    """xentoollog.h: a logger, of the kind that writes to a stream."""


class xc_interface(Opaque):
    """xenctrl.h."""


class xc_dom_image(Opaque):
    """xenguest.h."""


class xencall_handle(Opaque):
    """xencall.h."""


class xendevicemodel_handle(Opaque):
    """xendevicemodel.h."""


class xenevtchn_handle(Opaque):
    """xenevtchn.h."""


class xenforeignmemory_handle(Opaque):
    """xenforeignmemory.h."""


class xenforeignmemory_resource_handle(Opaque):
    """xenforeignmemory.h."""


class xengnttab_handle(Opaque):
    """xengnttab.h."""


class domid_t:
    """A domain identifier: 16 bits in the hypervisor, 32 in most prototypes.

    libxenctrl cuts it down without a word, so that 65536 would mean domain 0:
    what is out of range must not get there.
    """

    @classmethod
    def from_param(cls, value: int) -> int:
        """Called by ctypes for each argument; raises ctypes.ArgumentError."""
        if 0 <= value <= DOMID_IDLE:
            return value
        raise ValueError(f"{value} is not a domain identifier")


# Checkers: (result type, check)


def failure(function: Any, arguments: tuple[Any, ...], errno: int) -> CallFailed:
    """What to raise for a call that failed, with what the library said of it."""
    log = getattr(arguments[0], "log", None) if arguments else None
    name = function.__name__
    hint = ""
    if errno == EACCES and name.startswith("xc_"):
        hint = "libxenctrl and the running hypervisor speak different versions"
    elif errno == EPERM and name.startswith("xc_"):
        hint = "only Dom0 may do this"
    return CallFailed(name, errno, log.take() if log is not None else "", hint=hint)


def _zero(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result:
        raise failure(function, arguments, get_errno())
    return result


def _count(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result < 0:
        raise failure(function, arguments, get_errno())
    return result


def _negative_errno(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    if result < 0:
        raise failure(function, arguments, -result)
    return result


def _pointer(result: Any, function: Any, arguments: tuple[Any, ...]) -> Any:
    if not result:
        raise failure(function, arguments, get_errno())
    return result


ZERO: Checker = (c_int, _zero)  # 0, or -1 and errno
COUNT: Checker = (c_int, _count)  # a number, or -1 and errno
LONG_COUNT: Checker = (c_long, _count)
NEGATIVE_ERRNO: Checker = (c_int, _negative_errno)  # a number, or -errno
ADDRESS: Checker = (c_void_p, _pointer)  # an address, or NULL and errno
NOTHING: Checker = (None, None)


def returns(kind: Any) -> Checker:
    """Any value of this type is a success."""
    return (kind, None)


def handle(kind: type[Opaque]) -> Checker:
    """A handle, or NULL and errno."""
    return (kind, _pointer)


# Tables

_frames_t = POINTER(c_ulong)
_uint32_p = POINTER(c_uint32)

XENTOOLLOG: dict[str, Row] = {
    "xtl_createlogger_stdiostream": (
        handle(xentoollog_logger_stdiostream),
        c_void_p,
        c_int,
        c_uint,
    ),
    "xtl_stdiostream_set_minlevel": (NOTHING, xentoollog_logger_stdiostream, c_int),
    "xtl_logger_destroy": (NOTHING, xentoollog_logger),
    # Variadic in C; without further arguments it is called like any other.
    "xtl_log": (NOTHING, xentoollog_logger, c_int, c_int, c_char_p, c_char_p),
}

XENTOOLCORE: dict[str, Row] = {
    "xentoolcore_restrict_all": (ZERO, domid_t),
}

XENCALL: dict[str, Row] = {
    "xencall_open": (handle(xencall_handle), xentoollog_logger, c_uint),
    "xencall_close": (ZERO, xencall_handle),
    "xencall_fd": (COUNT, xencall_handle),
    "xencall0": (COUNT, xencall_handle, c_uint),
    "xencall1": (COUNT, xencall_handle, c_uint, c_uint64),
    "xencall2": (COUNT, xencall_handle, c_uint, c_uint64, c_uint64),
    "xencall3": (COUNT, xencall_handle, c_uint, c_uint64, c_uint64, c_uint64),
    "xencall4": (COUNT, xencall_handle, c_uint, c_uint64, c_uint64, c_uint64, c_uint64),
    "xencall5": (COUNT, xencall_handle, c_uint, c_uint64, c_uint64, c_uint64, c_uint64, c_uint64),
    "xencall_alloc_buffer": (ADDRESS, xencall_handle, c_size_t),
    "xencall_free_buffer": (NOTHING, xencall_handle, c_void_p),
}

XENDEVICEMODEL: dict[str, Row] = {
    "xendevicemodel_open": (handle(xendevicemodel_handle), xentoollog_logger, c_uint),
    "xendevicemodel_close": (ZERO, xendevicemodel_handle),
    "xendevicemodel_restrict": (ZERO, xendevicemodel_handle, domid_t),
    "xendevicemodel_shutdown": (ZERO, xendevicemodel_handle, domid_t, c_uint),
}

XENEVTCHN: dict[str, Row] = {
    "xenevtchn_open": (handle(xenevtchn_handle), xentoollog_logger, c_uint),
    "xenevtchn_close": (ZERO, xenevtchn_handle),
    "xenevtchn_fd": (COUNT, xenevtchn_handle),
    "xenevtchn_bind_interdomain": (COUNT, xenevtchn_handle, domid_t, c_uint32),
    "xenevtchn_bind_unbound_port": (COUNT, xenevtchn_handle, domid_t),
    "xenevtchn_bind_virq": (COUNT, xenevtchn_handle, c_uint),
    "xenevtchn_unbind": (ZERO, xenevtchn_handle, c_uint32),
    "xenevtchn_notify": (ZERO, xenevtchn_handle, c_uint32),
    "xenevtchn_pending": (COUNT, xenevtchn_handle),
    "xenevtchn_unmask": (ZERO, xenevtchn_handle, c_uint32),
}

XENFOREIGNMEMORY: dict[str, Row] = {
    "xenforeignmemory_open": (handle(xenforeignmemory_handle), xentoollog_logger, c_uint),
    "xenforeignmemory_close": (ZERO, xenforeignmemory_handle),
    "xenforeignmemory_map": (
        ADDRESS,
        xenforeignmemory_handle,
        domid_t,
        c_int,
        c_size_t,
        _frames_t,
        POINTER(c_int),
    ),
    "xenforeignmemory_unmap": (ZERO, xenforeignmemory_handle, c_void_p, c_size_t),
    "xenforeignmemory_map_resource": (
        handle(xenforeignmemory_resource_handle),
        xenforeignmemory_handle,
        domid_t,
        c_uint,
        c_uint,
        c_ulong,
        c_ulong,
        POINTER(c_void_p),
        c_int,
        c_int,
    ),
    "xenforeignmemory_unmap_resource": (
        ZERO,
        xenforeignmemory_handle,
        xenforeignmemory_resource_handle,
    ),
    "xenforeignmemory_resource_size": (
        ZERO,
        xenforeignmemory_handle,
        domid_t,
        c_uint,
        c_uint,
        POINTER(c_size_t),
    ),
}

XENGNTTAB: dict[str, Row] = {
    "xengnttab_open": (handle(xengnttab_handle), xentoollog_logger, c_uint),
    "xengnttab_close": (ZERO, xengnttab_handle),
    "xengnttab_map_domain_grant_refs": (
        ADDRESS,
        xengnttab_handle,
        c_uint32,
        domid_t,
        _uint32_p,
        c_int,
    ),
    "xengnttab_unmap": (ZERO, xengnttab_handle, c_void_p, c_uint32),
}

XENCTRL: dict[str, Row] = {
    "xc_interface_open": (handle(xc_interface), xentoollog_logger, xentoollog_logger, c_uint),
    "xc_interface_close": (ZERO, xc_interface),
    "xc_interface_xcall_handle": (handle(xencall_handle), xc_interface),
    "xc_interface_fmem_handle": (handle(xenforeignmemory_handle), xc_interface),
    "xc_interface_dmod_handle": (handle(xendevicemodel_handle), xc_interface),
    # domains; the third argument of xc_domain_create depends on the release
    "xc_domain_create": (ZERO, xc_interface, _uint32_p, c_void_p),
    "xc_domain_destroy": (ZERO, xc_interface, domid_t),
    "xc_domain_pause": (ZERO, xc_interface, domid_t),
    "xc_domain_unpause": (ZERO, xc_interface, domid_t),
    "xc_domain_shutdown": (ZERO, xc_interface, domid_t, c_int),
    "xc_domain_max_vcpus": (ZERO, xc_interface, domid_t, c_uint),
    "xc_domain_setmaxmem": (ZERO, xc_interface, domid_t, c_uint64),
    "xc_domain_set_memmap_limit": (ZERO, xc_interface, domid_t, c_ulong),
    "xc_domain_set_memory_map": (ZERO, xc_interface, domid_t, c_void_p, c_uint32),
    "xc_domain_sethandle": (ZERO, xc_interface, domid_t, c_char_p),
    "xc_domain_set_time_offset": (ZERO, xc_interface, domid_t, c_int32),
    "xc_domain_set_tsc_info": (
        ZERO,
        xc_interface,
        domid_t,
        c_uint32,
        c_uint64,
        c_uint32,
        c_uint32,
    ),
    "xc_domain_get_guest_width": (ZERO, xc_interface, domid_t, POINTER(c_uint)),
    "xc_domain_getinfolist": (COUNT, xc_interface, domid_t, c_uint, c_void_p),
    "xc_set_paging_mempool_size": (ZERO, xc_interface, domid_t, c_uint64),
    # vcpus
    "xc_get_max_cpus": (COUNT, xc_interface),
    "xc_vcpu_setaffinity": (ZERO, xc_interface, domid_t, c_int, c_void_p, c_void_p, c_uint32),
    "xc_vcpu_getaffinity": (ZERO, xc_interface, domid_t, c_int, c_void_p, c_void_p, c_uint32),
    "xc_vcpu_getinfo": (ZERO, xc_interface, domid_t, c_uint32, c_void_p),
    # memory
    "xc_domain_populate_physmap_exact": (
        ZERO,
        xc_interface,
        domid_t,
        c_ulong,
        c_uint,
        c_uint,
        _frames_t,
    ),
    "xc_domain_decrease_reservation_exact": (
        ZERO,
        xc_interface,
        domid_t,
        c_ulong,
        c_uint,
        _frames_t,
    ),
    "xc_domain_add_to_physmap": (ZERO, xc_interface, domid_t, c_uint, c_ulong, c_ulong),
    "xc_domain_claim_pages": (ZERO, xc_interface, domid_t, c_ulong),
    "xc_get_tot_pages": (LONG_COUNT, xc_interface, domid_t),
    "xc_maximum_ram_page": (ZERO, xc_interface, POINTER(c_ulong)),
    # event channels
    "xc_evtchn_alloc_unbound": (COUNT, xc_interface, domid_t, domid_t),
    "xc_evtchn_reset": (ZERO, xc_interface, domid_t),
    "xc_evtchn_status": (ZERO, xc_interface, c_void_p),
    # HVM and PVH
    "xc_hvm_param_set": (ZERO, xc_interface, domid_t, c_uint32, c_uint64),
    "xc_hvm_param_get": (ZERO, xc_interface, domid_t, c_uint32, POINTER(c_uint64)),
    # the host
    "xc_physinfo": (ZERO, xc_interface, c_void_p),
    "xc_sched_id": (ZERO, xc_interface, POINTER(c_int)),
    "xc_version": (COUNT, xc_interface, c_int, c_void_p),
    "xc_sharing_freed_pages": (LONG_COUNT, xc_interface),
    "xc_sharing_used_frames": (LONG_COUNT, xc_interface),
    "xc_cpupool_freeinfo": (ADDRESS, xc_interface),
    "xc_readconsolering": (
        ZERO,
        xc_interface,
        c_void_p,
        POINTER(c_uint),
        c_int,
        c_int,
        _uint32_p,
    ),
    "xc_send_debug_keys": (ZERO, xc_interface, c_char_p),
}

XENGUEST: dict[str, Row] = {
    "xc_domain_resume": (ZERO, xc_interface, domid_t, c_int),
    "xc_cpuid_apply_policy": (
        NEGATIVE_ERRNO,
        xc_interface,
        domid_t,
        c_bool,
        c_void_p,
        c_uint,
        c_bool,
        c_bool,
        c_bool,
        c_void_p,
        c_void_p,
    ),
    "xc_dom_allocate": (handle(xc_dom_image), xc_interface, c_char_p, c_char_p),
    "xc_dom_release": (NOTHING, xc_dom_image),
    "xc_dom_boot_xen_init": (ZERO, xc_dom_image, xc_interface, domid_t),
    "xc_dom_kernel_file": (ZERO, xc_dom_image, c_char_p),
    "xc_dom_kernel_mem": (ZERO, xc_dom_image, c_void_p, c_size_t),
    "xc_dom_kernel_max_size": (ZERO, xc_dom_image, c_size_t),
    "xc_dom_module_file": (ZERO, xc_dom_image, c_char_p, c_char_p),
    "xc_dom_module_mem": (ZERO, xc_dom_image, c_void_p, c_size_t, c_char_p),
    "xc_dom_module_max_size": (ZERO, xc_dom_image, c_size_t),
    "xc_dom_parse_image": (ZERO, xc_dom_image),
    "xc_dom_rambase_init": (ZERO, xc_dom_image, c_uint64),
    "xc_dom_mem_init": (ZERO, xc_dom_image, c_uint),
    "xc_dom_boot_mem_init": (ZERO, xc_dom_image),
    "xc_dom_build_image": (ZERO, xc_dom_image),
    "xc_dom_boot_image": (ZERO, xc_dom_image),
    "xc_dom_gnttab_init": (ZERO, xc_dom_image),
    "xc_dom_gnttab_seed": (
        ZERO,
        xc_interface,
        domid_t,
        c_bool,
        c_ulong,
        c_ulong,
        c_uint32,
        c_uint32,
    ),
    "xc_dom_translated": (returns(c_bool), xc_dom_image),
    "xc_dom_feature_get": (returns(c_bool), xc_dom_image, c_uint),
    "xc_dom_guest_os": (returns(c_char_p), xc_dom_image),
    "xc_dom_virt_base": (returns(c_uint64), xc_dom_image),
    "xc_dom_virt_entry": (returns(c_uint64), xc_dom_image),
}

# The C library: the memory stream that libxentoollog writes to, and free() for
# what libxenctrl allocates.
LIBC: dict[str, Row] = {
    "fmemopen": (ADDRESS, c_void_p, c_size_t, c_char_p),
    "fclose": (returns(c_int), c_void_p),
    "rewind": (NOTHING, c_void_p),
    "__fpurge": (NOTHING, c_void_p),
    "free": (NOTHING, c_void_p),
}

SIGNATURES: dict[str, dict[str, Row]] = {
    "c": LIBC,
    "xencall": XENCALL,
    "xenctrl": XENCTRL,
    "xendevicemodel": XENDEVICEMODEL,
    "xenevtchn": XENEVTCHN,
    "xenforeignmemory": XENFOREIGNMEMORY,
    "xengnttab": XENGNTTAB,
    "xenguest": XENGUEST,
    "xentoolcore": XENTOOLCORE,
    "xentoollog": XENTOOLLOG,
}
