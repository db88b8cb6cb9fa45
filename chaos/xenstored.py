"""What a host's xenstored is told of our domains: their names, which ``xl list`` looks up there.

libxl finds a domain's name at /local/domain/DOMID/name (libxl_domid_to_name and libxl_name_to_domid
in its libxl_utils.c) and calls the domain "(null)" otherwise. Where noxsd serves the host there is
no xl, and nothing is written.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from xenctypes.errors import BusError

if TYPE_CHECKING:
    from chaos.host import Host

SOCKETS = ("/run/xenstored/socket", "/var/run/xenstored/socket")


def serves(host: Host) -> bool:
    """Whether this host runs xenstored."""
    if not any(map(os.path.exists, SOCKETS)):
        return False
    try:
        return "/xenstored/" in host.bus.path
    except BusError:
        return False  # a socket without a server: xl does not work here either


def announce(host: Host, domid: int, name: str) -> None:
    """Let xl know a domain by its name. Raises BusError."""
    if serves(host):
        host.bus.write(f"{_directory(domid)}/name", name)


def withdraw(host: Host, domid: int) -> None:
    """Undo ``announce``, also one that was never made. Raises BusError.

    Before the vifs are taken away: what is left of their nodes then goes with the last of them.
    """
    if not serves(host):
        return
    directory = _directory(domid)
    host.bus.rm(f"{directory}/name")
    if host.bus.children(directory) == []:
        host.bus.rm(directory)


def _directory(domid: int) -> str:
    return f"/local/domain/{domid}"
