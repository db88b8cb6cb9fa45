"""libxenevtchn: this domain's event channels (xenevtchn.h, event_channel.h).

An event is a bit: several notifications before it is read are one event. After
it is read its port stays masked, and silent, until ``unmask()``.
"""

from __future__ import annotations

import select
from time import monotonic

from xenctypes.handle import Handle
from xenctypes.loader import load, open_handle
from xenctypes.public import VIRQ_DOM_EXC

__all__ = ["VIRQ_DOM_EXC", "Evtchn"]


class Evtchn(Handle):
    """A handle to the event channel device (/dev/xen/evtchn).

    Closing it unbinds all its ports. ``fd`` is readable while an event waits.
    Not for several threads at once.
    """

    def __init__(self) -> None:
        self._lib = load("xenevtchn")
        self._seen: dict[int, None] = {}
        super().__init__(
            lambda log: open_handle(self._lib.xenevtchn_open, log.logger, 0),
            self._lib.xenevtchn_close,
        )
        self._fd = int(self._lib.xenevtchn_fd(self.raw))
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    @property
    def fd(self) -> int:
        """The file descriptor to poll for reading."""
        self._check_open("xenevtchn_fd")
        return self._fd

    def bind_interdomain(self, domid: int, remote_port: int) -> int:
        """Bind a new port to the other domain's unbound one, and return it.

        Xen sends one event to a port that is bound so, in case some got lost
        before: ``wait()`` for it before waiting for a real one.
        """
        return int(self._lib.xenevtchn_bind_interdomain(self.raw, domid, remote_port))

    def bind_unbound_port(self, domid: int) -> int:
        """A new port that ``domid`` may bind to."""
        return int(self._lib.xenevtchn_bind_unbound_port(self.raw, domid))

    def bind_virq(self, virq: int) -> int:
        """A new port for a virtual interrupt (VIRQ_*)."""
        return int(self._lib.xenevtchn_bind_virq(self.raw, virq))

    def unbind(self, port: int) -> None:
        """Close a port that was bound here."""
        self._lib.xenevtchn_unbind(self.raw, port)
        self._seen.pop(port, None)

    def notify(self, port: int) -> None:
        """Send an event to the other end of a port."""
        self._lib.xenevtchn_notify(self.raw, port)

    def pending(self) -> int:
        """The port of the next event; waits for one.

        The port stays masked until ``unmask()``. Poll ``fd`` not to wait.
        """
        if self._seen:
            port = next(iter(self._seen))
            del self._seen[port]
            return port
        return int(self._lib.xenevtchn_pending(self.raw))

    def unmask(self, port: int) -> None:
        """Let a port's events through again, after ``pending()`` returned it."""
        self._lib.xenevtchn_unmask(self.raw, port)

    def wait(self, port: int, timeout: float | None = None) -> bool:
        """Wait for an event on ``port``, at most ``timeout`` seconds; None: for ever.

        Takes the event and unmasks the port. Events of other ports that come
        meanwhile are kept for the next ``wait()`` or ``pending()``; their
        ports stay masked as ``pending()`` leaves them.
        """
        deadline = None if timeout is None else monotonic() + timeout
        while port not in self._seen:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            # Rounded up: waiting 0 ms for the last fraction would spin.
            if not self._poll.poll(None if left is None else int(left * 1000 + 0.999)):
                return False
            self._seen[int(self._lib.xenevtchn_pending(self.raw))] = None
        del self._seen[port]
        self.unmask(port)
        return True

    def take(self, limit: int) -> list[int]:
        """The ports of at most ``limit`` events that wait now; does not wait for one.

        The ports stay masked, and silent, until ``unmask()``.
        """
        while len(self._seen) < limit and self._poll.poll(0):
            self._seen[int(self._lib.xenevtchn_pending(self.raw))] = None
        ports = list(self._seen)[:limit]
        for port in ports:
            del self._seen[port]
        return ports

    def drain(self) -> list[int]:
        """Take and unmask all events that wait now; returns their ports."""
        while self._poll.poll(0):
            self._seen[int(self._lib.xenevtchn_pending(self.raw))] = None
        ports = list(self._seen)
        self._seen.clear()
        for port in ports:
            self.unmask(port)
        return ports
