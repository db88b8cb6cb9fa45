"""Names and numbers of virtual block devices.  Pure.

The numbers are those of xen-vbd-interface(7), the names those that libxl takes (Xen's
tools/libs/light/libxl_device.c, libxl__device_disk_dev_number), without its leniency in ``dNpM``
for signs, blanks and other bases; a letter or more is needed after ``xvd``.
"""

from __future__ import annotations

import re

from chaos.xldoc import quote
from xenctypes.errors import ConfigError

_EXTENDED = 1 << 28  # the scheme for more than 16 disks or partitions
_XVD = 202  # Linux's major number of xvda (drivers/block/xen-blkfront.c)


def parse_vdev(text: str) -> int:
    """The device number for a name: xvda1, sda, hdc, d0p1, or a number in C notation."""
    match = re.fullmatch(r"(xvd|hd|sd)([a-z]{1,5})([1-9][0-9]{0,2})?", text, re.ASCII)
    if match is not None:
        disk = 0
        for letter in match[2]:
            disk = disk * 26 + ord(letter) - ord("a") + 1
        number = _dev_number(match[1], disk - 1, int(match[3] or 0))
        if number is not None:
            return number
    match = re.fullmatch(r"d(0|[1-9][0-9]{0,6})p(0|[1-9][0-9]{0,2})", text, re.ASCII)
    if match is not None:
        number = _dev_number("xvd", int(match[1]), int(match[2]))
        if number is not None:
            return number
    match = re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}|0[0-7]{0,11}|[1-9][0-9]{0,9}", text, re.ASCII)
    if match is not None:
        base = 16 if text[1:2] in {"x", "X"} else 8 if text[0] == "0" else 10
        if int(text, base) < 1 << 31:
            return int(text, base)
    raise ConfigError(f"{quote(text)} is no virtual device", hint="for example xvda", key="vdev")


def _dev_number(kind: str, disk: int, partition: int) -> int | None:
    if kind == "xvd" and disk < 1 << 20 and partition < 256:
        if disk < 16 and partition < 16:
            return _XVD << 8 | disk << 4 | partition
        return _EXTENDED | disk << 8 | partition
    if kind == "hd" and disk < 4 and partition < 64:
        return (3 if disk < 2 else 22) << 8 | (disk & 1) << 6 | partition
    if kind == "sd" and disk < 16 and partition < 16:
        return 8 << 8 | disk << 4 | partition
    return None
