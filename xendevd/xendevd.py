"""xendevd: plugs the vifs of Xen guests and sets up their disks, with no script and no fork.

::

             bus, lock, sockets           catch up               event
    (start) -------------------> starting --------> serving <-----------> plugging
                                     ^                 |  bus lost, events lost
                                     +-----------------+

It starts as root and keeps CAP_NET_ADMIN, and CAP_DAC_OVERRIDE for files that are not root's.
docs/xendevd.md is for its users.
"""

from __future__ import annotations

import os
import select
import sys
from _signal import SIGINT, SIGTERM, set_wakeup_fd, signal  # type: ignore[import-not-found]  # as in noxsd
from time import monotonic
from typing import TYPE_CHECKING, NoReturn

from noxs import lockfile, privileges
from noxs.bus import Bus
from noxs.daemon import notify_manager
from noxs.hotplug import LOCK, BusError, ChaosError
from xendevd.block import Disks
from xendevd.monitor import Monitor, VbdEvent, VifEvent, present, present_disks
from xendevd.netlink import Rtnetlink
from xendevd.openvswitch import OpenVSwitch
from xendevd.plugger import Plugger

if TYPE_CHECKING:
    from argparse import ArgumentParser

RETRY = 1.0  # seconds until the bus is tried again


def log(text: str, *, level: int = 6) -> None:
    """One line on stderr; with its syslog level where the journal reads it (sd-daemon(3))."""
    prefix = f"<{level}>" if "JOURNAL_STREAM" in os.environ else "xendevd: "
    sys.stderr.write(f"{prefix}{text}\n")
    sys.stderr.flush()


class Daemon:
    """The loop around a Plugger and Disks."""

    def __init__(self, monitor: Monitor, plugger: Plugger, disks: Disks) -> None:
        self.monitor = monitor
        self.plugger = plugger
        self.disks = disks
        self.stopping = False
        self._again: float | None = None  # when to catch up, on the monotonic clock
        self._wake, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        set_wakeup_fd(wake, warn_on_full_buffer=False)

    def stop(self, *_signal: object) -> None:
        """Leave ``run`` soon."""
        self.stopping = True

    def catch_up(self) -> None:
        """Serve the vifs and disks that came while nobody listened."""
        self._again = None
        try:
            self.disks.catch_up(present_disks())
            self.plugger.handle(self.plugger.pending(present()))
            self.plugger.reconcile()
            self.plugger.report()
        except BusError as error:
            self._bus_lost(error)

    def run(self) -> None:
        """Serve until ``stop``."""
        while not self.stopping:
            poll = select.poll()
            poll.register(self._wake, select.POLLIN)
            poll.register(self.monitor, select.POLLIN)
            peer = self.plugger.switch.peer
            if peer is not None:
                poll.register(peer, select.POLLIN | (select.POLLOUT if peer.blocked else 0))
            dues = (self._again, peer.deadline if peer is not None else None)
            due = [at for at in dues if at is not None]
            timeout = max(0.0, min(due) - monotonic()) * 1000 if due else None
            ready = {fd for fd, _ in poll.poll(timeout)}
            try:
                self._serve(ready)
            except BusError as error:
                self._bus_lost(error)

    def _serve(self, ready: set[int]) -> None:
        if self.monitor.fileno() in ready:
            events, lost = self.monitor.read()
            if lost:
                log("the kernel's queue of events ran over: looking at every device", level=4)
                self._again = monotonic()
            self.plugger.handle(event for event in events if isinstance(event, VifEvent))
            self.disks.handle(event for event in events if isinstance(event, VbdEvent))
        peer = self.plugger.switch.peer
        if peer is not None:
            if peer.fileno() in ready:
                peer.send()
                peer.receive()
            if not peer.closed:
                peer.expire()
        self.plugger.report()
        if self._again is not None and self._again <= monotonic():
            self.catch_up()

    def _bus_lost(self, error: BusError) -> None:
        log(f"{error}; trying again", level=3)
        self._again = monotonic() + RETRY


def parser() -> ArgumentParser:
    """The parser of the command line."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="xendevd",
        description="Plugs the vifs of Xen guests into bridges, and sets their disks up."
        " Runs in the foreground.",
    )
    parser.add_argument("--foreground", action="store_true", help="the default, and only, mode")
    return parser


def serve() -> None:
    """Run until told to stop. Raises BusError or OSError if it cannot start."""
    lock = lockfile.take(LOCK, "xendevd")
    with Bus.connect() as bus:
        # Listen first and look then: what comes in between is seen twice, which does no harm.
        monitor = Monitor()
        daemon = Daemon(monitor, Plugger(bus, Rtnetlink(), OpenVSwitch(), log), Disks(bus, log))
        signal(SIGTERM, daemon.stop)
        signal(SIGINT, daemon.stop)
        privileges.keep_only(privileges.CAP_NET_ADMIN, privileges.CAP_DAC_OVERRIDE)
        daemon.catch_up()
        log(f"serving the vifs and disks on {bus.path}")
        notify_manager("READY=1")
        daemon.run()
        notify_manager("STOPPING=1")
    os.close(lock)


def main() -> NoReturn:
    """The command."""
    if sys.argv[1:]:  # without arguments argparse is not even imported
        parser().parse_args()
    try:
        serve()
    except ChaosError as error:
        log(str(error), level=3)
        sys.exit(error.exit_code)
    except OSError as error:
        log(f"cannot start: {error}", level=3)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
