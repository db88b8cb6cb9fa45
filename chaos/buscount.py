"""What the bus's server is asked meanwhile, and by whomever: counted by the server itself.

noxsd counts its requests; xenstored writes them into a log that it can be told to begin
(tools/xenstored/control.c, trace_io() in core.c).
"""

from __future__ import annotations

import contextlib
import errno as errnos
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from noxs.bus import Bus
from xenctypes.errors import BusError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CONTROL = "CONTROL"  # how it is asked for its count
PID_FILE = "/run/xen/xenstored.pid"
LOGS_ALREADY = {b"-T", b"--trace-file"}
REQUEST = re.compile(r"\bIN 0x[0-9a-f]+ \d{8} [\d:]{8} ([A-Z_]+) \(")


class BusCount:
    """``requests``: of each type; None where there is no server, or one that does not count."""

    requests: Counter[str] | None = None


@contextlib.contextmanager
def counted(found: BusCount) -> Iterator[None]:
    """Count the requests of all clients while within; they are in ``found`` afterwards."""
    with contextlib.ExitStack() as stack:
        try:
            bus = stack.enter_context(Bus.connect(patience=1))
            before = _asked(bus)
            if before is None:
                stack.enter_context(_logged(bus, found))
        except BusError:
            before = None
        yield
        if before is not None:
            found.requests = (_asked(bus) or before) - before


def read_log(lines: Iterable[str]) -> Counter[str]:
    """The requests in a log of xenstored's. Pure."""
    found = Counter(match[1] for line in lines if (match := REQUEST.search(line)))
    del found[CONTROL]
    return found


def _asked(bus: Bus) -> Counter[str] | None:
    """The count that noxsd keeps; None if the server has none."""
    try:
        lines = bus.control("count").splitlines()
    except BusError as error:
        if error.errno not in {errnos.EINVAL, errnos.ENOSYS}:
            raise
        return None
    found = Counter({name: int(number) for name, _, number in (x.partition(" ") for x in lines)})
    del found[CONTROL]
    return found


@contextlib.contextmanager
def _logged(bus: Bus, found: BusCount) -> Iterator[None]:
    """Have xenstored write its log meanwhile. BusError, also if it does so for somebody else."""
    try:
        pid = Path(PID_FILE).read_text(encoding="ascii").strip()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        arguments = []
    if any(word.partition(b"=")[0] in LOGS_ALREADY for word in arguments):
        raise BusError("xenstored writes its log for somebody else")
    with tempfile.TemporaryDirectory(prefix="chaos-bus-") as folder:
        log = Path(folder, "log")
        bus.control("logfile", str(log))
        try:
            yield
        finally:
            bus.control("log", "off")
        found.requests = read_log(log.read_text(errors="replace").splitlines())
