"""What noxsd and storesd have in common: their sockets, and how they start, run and end.

They are written to be up in milliseconds: modules that take long to import are not imported here.
"""

from __future__ import annotations

import gc
import os

# The signal and socket modules, written in Python, take 7 and 10 ms to import.
from _signal import SIGINT, SIGTERM, signal  # type: ignore[import-not-found]  # no stub has it
from _socket import AF_UNIX, SOCK_DGRAM, SOCK_STREAM, socket

from xenctypes.errors import BusError, ChaosError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Server(Protocol):
        """What serves, once it is started."""

        def run(self) -> None:
            """Serve until ``stop``."""

        def stop(self) -> None:
            """Have ``run`` return; may be called from a signal handler."""

        def described(self) -> str:
            """What is served, for the log."""


def listen(path: str, group: int = -1) -> socket:
    """The listening socket, in an existing directory, with its access restricted."""
    listener = socket(AF_UNIX, SOCK_STREAM)
    # Bound under another name first, so that no client meets a socket that nobody listens on.
    new = f"{path}.{os.getpid()}"
    mask = os.umask(0o177)
    try:
        listener.bind(new)
    except OSError as error:
        raise BusError(f"{path}: {error.strerror}") from error
    finally:
        os.umask(mask)
    if group >= 0:
        os.chown(new, -1, group)
        os.chmod(new, 0o660)
    listener.listen(128)
    os.rename(new, path)
    return listener


def boot_id() -> str:
    """The running kernel's own: what was written before it booted is not this host's state."""
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        return file.read().strip().decode()


def notify_manager(state: str) -> None:
    """Tell systemd, if it asked (sd_notify(3)): READY=1, STOPPING=1, STATUS=..."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    manager = socket(AF_UNIX, SOCK_DGRAM)
    try:
        manager.sendto(state.encode(), address.replace("@", "\0", 1))
    except OSError:
        pass  # it is gone; nobody else would want to know
    finally:
        manager.close()


def run(start: Callable[[], Server], log: Callable[[str], None]) -> int:
    """Start a server and serve until SIGTERM or SIGINT; the process's exit status."""
    try:
        server = start()
    except ChaosError as error:
        log(str(error))
        return error.exit_code
    except OSError as error:
        log(f"{error.filename or 'start'}: {error.strerror}")
        return 1
    for number in (SIGTERM, SIGINT):
        signal(number, lambda _number, _frame: server.stop())
    # Serving makes no reference cycles, and a collection takes longer the more nodes there are.
    gc.disable()
    notify_manager("READY=1")
    log(f"serving {server.described()}")
    server.run()
    return 0
