"""storesd: a private XenStore for each stock guest, on a host without xenstored.

It starts as root, opens the event channel and grant devices, its socket and its journals, and gives
up all capabilities. A guest's ring page is mapped by the grant that the domain builder leaves for
its store (GNTTAB_RESERVED_XENSTORE in grant_table.h), as xenstored does: after the start storesd
has no way to map anything that a guest has not granted to Dom0.
"""

from __future__ import annotations

import os
import sys

from noxs import lockfile
from noxs.bridge import Bridge
from noxs.daemon import boot_id, listen, run
from noxs.stores import Stores

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import ArgumentParser

    from xenctypes.handle import Mapping

SOCKET = "/run/noxs/storesd"
STATE = "/run/noxs/stores"
GNTTAB_RESERVED_XENSTORE = 1


class Options:
    """The command line's values, and their defaults."""

    socket = SOCKET
    state = STATE
    bus = ""


class Rings:
    """Guests' ring pages and event channels, from Xen. See stores.Hardware."""

    def __init__(self) -> None:
        from xenctypes.evtchn import Evtchn
        from xenctypes.gnttab import Gnttab

        self._evtchn = Evtchn()
        self._gnttab = Gnttab()

    def fileno(self) -> int:
        """Readable while an event waits."""
        return self._evtchn.fd

    def map(self, domid: int) -> Mapping:
        """A guest's ring page. CallFailed."""
        return self._gnttab.map_grant_refs(domid, [GNTTAB_RESERVED_XENSTORE])

    def bind(self, domid: int, remote_port: int) -> int:
        """A new port, bound to the guest's. CallFailed."""
        return self._evtchn.bind_interdomain(domid, remote_port)

    def unbind(self, port: int) -> None:
        """Close a port."""
        self._evtchn.unbind(port)

    def notify(self, port: int) -> None:
        """Send an event. Nothing happens if the guest has closed its end."""
        self._evtchn.notify(port)

    def take(self, limit: int) -> list[int]:
        """Ports that had an event, which stay masked until ``unmask``."""
        return self._evtchn.take(limit)

    def unmask(self, port: int) -> None:
        """Let the next event of a port through."""
        self._evtchn.unmask(port)


def log(message: str) -> None:
    """One line on stderr, where the service manager collects it."""
    sys.stderr.write(f"storesd: {message}\n")
    sys.stderr.flush()


def parser() -> ArgumentParser:
    """The parser of the command line."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="storesd",
        description="A private XenStore for each stock guest of a Xen host without xenstored."
        " Runs in the foreground.",
    )
    parser.add_argument("--socket", default=SOCKET, help="where to listen (%(default)s)")
    parser.add_argument(
        "--state",
        default=STATE,
        metavar="DIR",
        help='the guests\' journals, on a tmpfs; "" for none (%(default)s)',
    )
    parser.add_argument(
        "--bus", default="", metavar="SOCKET", help="Dom0's bus (noxsd's socket, if there is one)"
    )
    return parser


def parse(argv: list[str]) -> Options:
    """The options; without arguments argparse is not even imported."""
    options = Options()
    if argv:
        parser().parse_args(argv, namespace=options)
    return options


def living() -> dict[int, str]:
    """The UUID of each domain of this host. Raises XenError."""
    from uuid import UUID

    from xenctypes.ctrl import Xenctrl

    with Xenctrl() as ctrl:
        domains = [info for info in ctrl.domain_list() if not info.dying]
    return {info.domid: str(UUID(bytes=info.uuid)) for info in domains}


def start(options: Options) -> Stores:
    """Everything before the first request."""
    from noxs.bus import Bus
    from noxs.privileges import keep_only

    os.makedirs(os.path.dirname(options.socket) or ".", mode=0o755, exist_ok=True)
    lockfile.take(options.socket + ".lock", "storesd")
    # Whose journals are whose is asked once, by a handle that is closed again.
    alive = living()
    rings = Rings()
    if options.state:
        os.makedirs(options.state, mode=0o700, exist_ok=True)
    listener = listen(options.socket)
    if os.geteuid() == 0:
        keep_only()
    bridge = Bridge(lambda: Bus.connect(options.bus or None), log)
    stores = Stores(listener, rings, bridge, state=options.state, boot=boot_id(), log=log)
    stores.restore(alive.get)
    bridge.start()
    return stores


def main(argv: list[str] | None = None) -> int:
    """Run the daemon; its exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    return run(lambda: start(parse(arguments)), log)


if __name__ == "__main__":
    sys.exit(main())
