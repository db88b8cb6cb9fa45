"""Xen's own libxlutil, the oracle of the configuration tests; it runs without Xen.

Any release will do: the language has not changed since 4.13.
"""

import ctypes
import ctypes.util
import glob
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_long, c_uint32, c_uint64, c_void_p

import pytest

XLU_STRING = 0


def _newest(name: str) -> str | None:
    """libxlutil and libxenlight carry the release in their names."""
    found = glob.glob(f"/usr/lib/*/{name}.so.4.*[0-9]")
    found += glob.glob(f"/usr/lib/xen-*/lib/*/{name}.so.4.*[0-9]")
    return max(
        found, default=None, key=lambda path: [int(n) for n in path.split(".so.")[1].split(".")]
    )


class Disk(ctypes.Structure):
    """struct libxl_device_disk of 4.17 to 4.20 (_libxl_types.h); the tail may grow."""

    _fields_ = (
        ("backend_domid", c_uint32),
        ("backend_domname", c_char_p),
        ("pdev_path", c_char_p),
        ("vdev", c_char_p),
        ("backend", c_int),
        ("format", c_int),
        ("script", c_char_p),
        ("removable", c_int),
        ("readwrite", c_int),
        ("is_cdrom", c_int),
        ("direct_io_safe", c_bool),
        ("discard_enable", c_int),
        ("specification", c_int),
        ("transport", c_int),
        ("irq", c_uint32),
        ("base", c_uint64),
        ("colo_enable", c_int),
        ("colo_restore_enable", c_int),
        ("colo_host", c_char_p),
        ("colo_port", c_int),
        ("colo_export", c_char_p),
        ("active_disk", c_char_p),
        ("hidden_disk", c_char_p),
        ("trusted", c_int),
        ("room", ctypes.c_char * 256),
    )


class Nic(ctypes.Structure):
    """The head of struct libxl_device_nic."""

    _fields_ = (
        ("backend_domid", c_uint32),
        ("backend_domname", c_char_p),
        ("devid", c_int),
        ("mtu", c_int),
        ("model", c_char_p),
        ("mac", ctypes.c_uint8 * 6),
        ("ip", c_char_p),
        ("bridge", c_char_p),
        ("ifname", c_char_p),
        ("script", c_char_p),
        ("nictype", c_int),
        ("rate_bytes_per_interval", c_uint64),
        ("rate_interval_usecs", c_uint32),
        ("room", ctypes.c_char * 4096),
    )


_xlu_path = _newest("libxlutil")
_light_path = _newest("libxenlight")
needs_xlutil = pytest.mark.skipif(
    not (_xlu_path and _light_path), reason="libxlutil is not installed (package libxenmisc)"
)
if _xlu_path and _light_path:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fopen.restype = c_void_p
    libc.fopen.argtypes = (c_char_p, c_char_p)
    light = ctypes.CDLL(_light_path)
    light.libxl_device_disk_init.argtypes = (POINTER(Disk),)
    light.libxl_device_nic_init.argtypes = (POINTER(Nic),)
    xlu = ctypes.CDLL(_xlu_path, use_errno=True)
    xlu.xlu_cfg_init.restype = c_void_p
    xlu.xlu_cfg_init.argtypes = (c_void_p, c_char_p)
    xlu.xlu_cfg_destroy.argtypes = (c_void_p,)
    xlu.xlu_cfg_destroy.restype = None
    xlu.xlu_cfg_readdata.argtypes = (c_void_p, c_char_p, c_int)
    xlu.xlu_cfg_get_string.argtypes = (c_void_p, c_char_p, POINTER(c_char_p), c_int)
    xlu.xlu_cfg_get_long.argtypes = (c_void_p, c_char_p, POINTER(c_long), c_int)
    xlu.xlu_cfg_get_defbool.argtypes = (c_void_p, c_char_p, POINTER(c_int), c_int)
    xlu.xlu_cfg_get_list.argtypes = (c_void_p, c_char_p, POINTER(c_void_p), c_void_p, c_int)
    xlu.xlu_cfg_get_listitem2.argtypes = (c_void_p, c_int)
    xlu.xlu_cfg_get_listitem2.restype = c_void_p
    xlu.xlu_cfg_value_type.argtypes = (c_void_p,)
    xlu.xlu_cfg_value_get_string.argtypes = (c_void_p, c_void_p, POINTER(c_char_p), c_int)
    xlu.xlu_cfg_value_get_list.argtypes = (c_void_p, c_void_p, POINTER(c_void_p), c_int)
    xlu.xlu_disk_parse.argtypes = (c_void_p, c_int, POINTER(c_char_p), POINTER(Disk))
    xlu.xlu_vif_parse_rate.argtypes = (c_void_p, c_char_p, POINTER(Nic))
    _report = libc.fopen(b"/dev/null", b"w")


@contextmanager
def config() -> Iterator[int]:
    handle = xlu.xlu_cfg_init(_report, b"oracle")
    try:
        yield handle
    finally:
        xlu.xlu_cfg_destroy(handle)


Tree = bytes | list["Tree"]
Answers = tuple[Tree | int, int | tuple[int], int]


def read(data: bytes, names: set[str]) -> dict[str, Answers] | None:
    """None when the text is refused; else for each name its value, its long, its defbool.

    A value is bytes or lists of values; a long is in a tuple; anything else is an errno.
    """
    with config() as handle:
        if xlu.xlu_cfg_readdata(handle, data, len(data)):
            return None
        return {name: _answers(handle, name.encode()) for name in names}


def _answers(handle: int, name: bytes) -> Answers:
    value: Tree | int
    text, items, number, flag = c_char_p(), c_void_p(), c_long(), c_int()
    code = xlu.xlu_cfg_get_string(handle, name, byref(text), 1)
    if not code:
        value = text.value or b""
    else:
        listed = xlu.xlu_cfg_get_list(handle, name, byref(items), None, 1)
        value = listed or _items(handle, items)
    code = xlu.xlu_cfg_get_long(handle, name, byref(number), 1)
    boolean = xlu.xlu_cfg_get_defbool(handle, name, byref(flag), 1)
    return value, code or (number.value,), boolean


def _items(handle: int, items: c_void_p) -> list[Tree]:
    result: list[Tree] = []
    while (value := xlu.xlu_cfg_get_listitem2(items, len(result))) is not None:
        if xlu.xlu_cfg_value_type(value) == XLU_STRING:
            text = c_char_p()
            assert not xlu.xlu_cfg_value_get_string(handle, value, byref(text), 1)
            result.append(text.value or b"")
        else:
            inner = c_void_p()
            assert not xlu.xlu_cfg_value_get_list(handle, value, byref(inner), 1)
            result.append(_items(handle, inner))
    return result


def disk(spec: bytes) -> Disk | None:
    """The disk that a specification stands for, None when it is refused."""
    result = Disk()
    light.libxl_device_disk_init(byref(result))
    with config() as handle:
        code = xlu.xlu_disk_parse(handle, 1, (c_char_p * 1)(spec), byref(result))
    return None if code else result


def rate(text: bytes) -> tuple[int, int] | None:
    """Bytes for each interval, and its microseconds; None when the rate is refused."""
    nic = Nic()
    light.libxl_device_nic_init(byref(nic))
    ctypes.set_errno(0)  # libxlutil looks at errno without having cleared it
    with config() as handle:
        code = xlu.xlu_vif_parse_rate(handle, text, byref(nic))
    return None if code else (nic.rate_bytes_per_interval, nic.rate_interval_usecs)
