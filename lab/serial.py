"""The serial log: Xen's and Dom0's console, and what a crash looks like in it."""

import contextlib
import re
import socket
import time
from pathlib import Path

# Lines that a guest wrote through Xen's console carry "(d<domid>)": they prove nothing.
_GUEST = re.compile(rb"^\(d\d+\)")
_SIGNS = (
    (re.compile(rb"^\(XEN\) Panic on CPU"), "Xen panicked"),
    (re.compile(rb"^\(XEN\) Xen (?:BUG|call trace)|^\(XEN\) Assertion '"), "Xen crashed"),
    (re.compile(rb"Kernel panic - not syncing: ?(.*)"), "Dom0's kernel panicked"),
    (re.compile(rb"^\(XEN\) Hardware Dom0 crashed"), "Dom0 crashed"),
    (re.compile(rb"^lab init: (.* (?:failed|did not start).*|no /proc)"), "Dom0 did not start"),
    (re.compile(rb"^\(XEN\) Reboot disabled on cmdline"), "Dom0 wanted to reboot"),
    (re.compile(rb"^\(XEN\).*noreboot' set - not rebooting"), "Dom0 wanted to reboot"),
)

SETTLE_SECONDS = 2.0
TAIL_LINES = 40

TO_XEN = b"\x01" * 3
"""Ctrl-A three times: what is typed on the serial line goes to Xen, not to Dom0."""

QUESTIONS = {
    "0": "registers of Dom0",
    "r": "run queues",
    "a": "timers",
    "i": "interrupts",
    "z": "IO-APIC",
    "e": "event channels",
}
"""Xen's debug keys for a Dom0 that does nothing any more."""

ANSWER_SECONDS = 20.0
QUIET_SECONDS = 4.0
"""A Xen that gets few interrupts says little at a time."""

ANSWER_BYTES = 48 << 10


def crash_in(line: bytes) -> str:
    """Say what a line of the log tells of a crash, or "" if it tells of none."""
    if _GUEST.match(line):
        return ""
    for pattern, meaning in _SIGNS:
        if match := pattern.search(line):
            detail = match[1].decode(errors="replace").strip() if pattern.groups else ""
            return f"{meaning}: {detail}" if detail else meaning
    return ""


class SerialLog:
    """Follows a serial log while it grows."""

    def __init__(self, path: Path, *, from_start: bool = True) -> None:
        self._path = path
        self._offset = 0 if from_start else self._size()
        self._rest = b""

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0

    def crash(self) -> str:
        """Read what is new; return the first sign of a crash in it, or ""."""
        if self._size() <= self._offset:
            return ""
        with self._path.open("rb") as log:
            log.seek(self._offset)
            data = log.read()
        self._offset += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return next((sign for line in lines if (sign := crash_in(line.strip(b"\r")))), "")

    def interrogation(self, line: Path) -> str:
        """Return the tail, and what Xen says of a hanging Dom0; ``line`` is the serial socket."""
        before = self.tail()
        start = self._size()
        with socket.socket(socket.AF_UNIX) as xen:
            xen.settimeout(ANSWER_SECONDS)
            with contextlib.suppress(OSError):
                xen.connect(str(line))
                xen.sendall(TO_XEN + "".join(QUESTIONS).encode())
                self._settle(ANSWER_SECONDS, quiet=QUIET_SECONDS)
        with contextlib.suppress(OSError), self._path.open("rb") as log:
            log.seek(start)
            answer = log.read(ANSWER_BYTES).decode(errors="replace").replace("\r", "")
            return (
                f"{before}\n--- asked for {', '.join(QUESTIONS.values())}, Xen says ---\n{answer}"
            )
        return before

    def _settle(self, limit: float, *, quiet: float = 0.3) -> None:
        """Wait until the log has not grown for ``quiet`` seconds, or ``limit`` seconds."""
        deadline = time.monotonic() + limit
        size = -1
        while size != (size := self._size()) and time.monotonic() < deadline:
            time.sleep(quiet)

    def tail(self) -> str:
        """Return the last lines, once the dying machine has no more to say (or after 2 s)."""
        self._settle(SETTLE_SECONDS)
        try:
            text = self._path.read_bytes().decode(errors="replace").replace("\r", "")
        except OSError:
            return ""
        return "\n".join(text.rstrip().split("\n")[-TAIL_LINES:])
