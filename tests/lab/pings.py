"""Echo requests to guests: how many of them are answered, however late."""

from __future__ import annotations

import contextlib
import socket
import struct
from pathlib import Path
from time import monotonic

PATIENCE = 10.0
"""Seconds for the answers that miss when all is sent. ping(8) allows the last one a single
interval, or twice the longest round trip: less than the emulator may take for anything."""
WHO_MAY = Path("/proc/sys/net/ipv4/ping_group_range")  # of IPv6 as well
ECHO, ECHO6 = 8, 128


def ping(address: str, count: int, interval: float = 0.02) -> int:
    """How many of ``count`` requests, ``interval`` seconds apart, the guest answers."""
    six = ":" in address
    family = socket.AF_INET6 if six else socket.AF_INET
    protocol, kind = (socket.IPPROTO_ICMPV6, ECHO6) if six else (socket.IPPROTO_ICMP, ECHO)
    answered: set[int] = set()
    WHO_MAY.write_text("0 0")
    with socket.socket(family, socket.SOCK_DGRAM, protocol) as sock:
        sock.connect((address, 0))

        def listen(seconds: float, wanted: int) -> None:
            until = monotonic() + seconds
            while len(answered) < wanted and (left := until - monotonic()) > 0:
                sock.settimeout(left)
                with contextlib.suppress(OSError):  # too late, or "No route to host"
                    answered.add(struct.unpack_from("!H", sock.recv(2048), 6)[0])

        for number in range(count):
            with contextlib.suppress(OSError):
                sock.send(struct.pack("!BBHHH", kind, 0, 0, 0, number) + bytes(56))
            listen(interval, count + 1)
        listen(PATIENCE, count)
    return len(answered)
