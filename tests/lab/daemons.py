"""The host's daemons, for the tests that need them: started where they do not run."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import subprocess
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from waiting import wait_for

from noxs import gueststores, hotplug
from noxs.bus import Bus
from noxs.gueststores import SOCKET as STORESD_SOCKET
from noxs.gueststores import GuestStores
from xenctypes.errors import BusError

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 60.0
NOXSD_SOCKET = "/run/noxs/socket"
CREDENTIALS = struct.Struct("iII")


def start(*command: str) -> subprocess.Popen[bytes]:
    """Start a daemon that outlives the test; its log is /run/NAME.log."""
    with Path(f"/run/{command[0]}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def end(pid: int, number: int = signal.SIGTERM) -> None:
    """End a daemon and wait until it is gone."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, number)
        assert select.select([process], [], [], PATIENCE)[0], f"process {pid} does not end"
    finally:
        os.close(process)


def ensure_bus() -> None:
    """A store answers: xenstored where it runs, else noxsd."""
    try:
        Bus.connect(patience=0.1).close()
    except BusError:
        start("noxsd")
        wait_for(lambda: Path(NOXSD_SOCKET).exists(), "noxsd does not start")


def noxsd_pid() -> int:
    """The process that serves noxsd's socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(NOXSD_SOCKET)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    return int(CREDENTIALS.unpack(credentials)[0])


def serves() -> bool:
    """Whether noxsd does."""
    try:
        return noxsd_pid() > 0
    except OSError:
        return False


def ensure_xendevd() -> None:
    """Somebody plugs vifs."""
    if not hotplug.running():
        start("xendevd")
        wait_for(hotplug.running, "xendevd does not start")


def storesd_pid() -> int:
    """The process that serves stock guests' stores."""
    found = subprocess.run(
        ["fuser", f"{STORESD_SOCKET}.lock"], capture_output=True, text=True, check=True
    )
    (pid,) = found.stdout.split()
    return int(pid)


def storesd_serves() -> bool:
    """Whether storesd does."""
    try:
        GuestStores.connect(patience=0.1).close()
    except BusError:
        return False
    return True


def ensure_storesd() -> None:
    """Somebody serves stock guests."""
    if not storesd_serves():
        start("storesd")
        wait_for(storesd_serves, "storesd does not start")


def stop_storesd() -> None:
    """Nobody serves stock guests."""
    if gueststores.running():
        end(storesd_pid())


def xendevd_pid() -> int:
    """The process that plugs vifs."""
    found = subprocess.run(["fuser", hotplug.LOCK], capture_output=True, text=True, check=True)
    (pid,) = found.stdout.split()
    return int(pid)


def stop_xendevd() -> None:
    """Nobody plugs vifs."""
    if hotplug.running():
        end(xendevd_pid())
    wait_for(lambda: not hotplug.running(), "xendevd does not stop")


@contextmanager
def openvswitch() -> Iterator[str]:
    """Open vSwitch with a bridge ovs0."""
    control = "/usr/share/openvswitch/scripts/ovs-ctl"
    subprocess.run(["modprobe", "openvswitch"], check=True)
    subprocess.run([control, "start", "--system-id=random"], check=True)
    try:
        subprocess.run(["ovs-vsctl", "--may-exist", "add-br", "ovs0"], check=True)
        yield "ovs0"
        subprocess.run(["ovs-vsctl", "del-br", "ovs0"], check=True)
    finally:
        subprocess.run([control, "stop"], check=True)


def loops() -> dict[str, str]:
    """Files behind loop devices, by the devices' names."""
    found = {}
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # one that goes this moment
            found[path.parts[3]] = path.read_text().strip()
    return found
