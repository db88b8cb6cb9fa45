"""What the benchmarks do with Dom0: start its daemons, ask chaosd, look at processes."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import clock

from chaos import frames
from chaos.client import Chaos
from chaos.connection import SOCKET
from chaos.steps import EXECUTE
from noxs import hotplug
from noxs.bus import Bus
from xenctypes.errors import BusError, ChaosError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TREE = Path(__file__).resolve().parent.parent
PATIENCE = 120.0
RESTING = 0.1
REST_MAX = 5.0
IDLE, IOWAIT = 3, 4
"""Fields of the first line of /proc/stat: proc(5)."""


def wait(condition: Callable[[], object], what: str) -> None:
    """Wait for what no event tells of."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(what)
        time.sleep(0.01)


def rest() -> None:
    """Wait until Dom0 has next to nothing to do: what udev and others do after a guest's end.

    At most REST_MAX seconds, for there are hosts that always have.
    """

    def busy() -> int:
        fields = [int(field) for field in Path("/proc/stat").read_text().split()[1:9]]
        return sum(fields) - fields[IDLE] - fields[IOWAIT]

    deadline = time.monotonic() + REST_MAX
    while time.monotonic() < deadline:
        before = busy()
        time.sleep(RESTING)
        if busy() - before <= 1:
            return


def start_daemons() -> None:
    """Noxsd where no xenstored runs, and xendevd."""
    try:
        Bus.connect(patience=0.1).close()
    except BusError:
        subprocess.Popen(["noxsd"])
        wait(lambda: Path("/run/noxs/socket").exists(), "noxsd does not start")
    if not hotplug.running():
        subprocess.Popen(["xendevd"])
        wait(hotplug.running, "xendevd does not start")


def start_chaosd(settings: Path) -> subprocess.Popen[bytes]:
    """The daemon; its log is /run/chaosd.log."""
    with Path("/run/chaosd.log").open("ab") as log:
        return subprocess.Popen(["chaosd", "--config", str(settings)], stderr=log)


def connect() -> Chaos:
    """A client, once the daemon answers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Chaos()
        except ChaosError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def runs_xenstored() -> bool:
    """Whether xl can work here; some of its verbs do without xenstored."""
    return Path("/run/xenstored/socket").exists()


def filled(chaos: Chaos) -> bool:
    """Whether the pool has all its shells and the makers rest."""
    flavours = chaos.pool_list()
    return all(f["ready"] == f["size"] and not f["making"] for f in flavours)


class Asker:
    """A plain connection to chaosd: what is timed is the daemon, not a client."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(SOCKET)
        self._number = 0

    def create(self, *requests: dict[str, Any]) -> tuple[float, list[Any]]:
        """Send a "create" for each of the parameters, all at once.

        Returns the milliseconds until all replies were there, and the replies as they came.
        """
        frame = b""
        for params in requests:
            self._number += 1
            frame += frames.pack_request(self._number, "create", params)
        splitter = frames.Splitter()
        replies: list[bytes] = []

        def exchange() -> None:
            self._socket.sendall(frame)
            while len(replies) < len(requests):
                replies.extend(splitter.feed(self._socket.recv(1 << 16)))

        elapsed = clock(exchange)
        values = []
        for body in replies:
            reply = frames.read_reply(body)
            if reply.kind != frames.OK:
                raise SystemExit(f"create: {reply.value}")
            values.append(reply.value)
        return elapsed, values


def awaited(made: dict[str, Any], *, cold: bool = False) -> Iterator[dict[str, Any]]:
    """The steps of a create's reply that its caller waited for: of a cold one, all of them.

    Of any other those that make the shell were done before, by the pool.
    """
    return (step for step in made["profile"]["steps"] if cold or step["phase"] == EXECUTE)


def process(name: str) -> int:
    """The pid of the process of that name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text() == f"{name}\n":
                    return int(entry.name)
            except OSError:
                continue  # it has just ended
    raise SystemExit(f"{name} is not running")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_kib(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise SystemExit("no VmRSS")
