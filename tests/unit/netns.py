"""A network namespace for a test: its own links, nobody else's."""

import ctypes
import fcntl
import os
import struct
import threading
from collections.abc import Callable
from typing import TypeVar

import pytest

Result = TypeVar("Result")
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000


def in_namespace(function: Callable[[], Result]) -> Result:
    """Run ``function`` in a thread in a new namespace (namespaces belong to threads)."""
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            enter()
            outcome.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again below, in the test's thread
            failure.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def enter() -> None:
    """Move this thread into a new namespace; skip the test where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) != 0:
        pytest.skip(f"no network namespace: {os.strerror(ctypes.get_errno())}")


def tap(name: str) -> int:
    """Make an interface; it lives as long as the descriptor is open."""
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no tap interfaces: {error}")
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return fd
