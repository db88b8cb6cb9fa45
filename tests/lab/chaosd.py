"""A chaosd of a test's own: started with the settings that it wants, and with what it breaks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import programs
from waiting import wait_for

from chaos.client import Chaos
from chaos.registry import Registry
from noxs.pageview import decode
from xenctypes.errors import ChaosError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chaos.host import Host

PATIENCE = 120.0
SETTINGS = Path("/run/chaos-test.toml")
OPTIONS = ("--config", str(SETTINGS))
LOG = Path("/run/chaosd.log")
GUESTS = "/src/guests/build"
HELLO, DAYTIME = "/src/examples/hello.cfg", "/src/examples/daytime.cfg"
NONE = "[pool]\nadaptive = false\n"


class Chaosd:
    """The daemon's process, without its interpreter's start (programs.py) unless ``installed``.

    ``code`` is Python that runs in it before it starts.
    """

    def __init__(self, settings: str = "", code: str = "", *, installed: bool = False) -> None:
        LOG.unlink(missing_ok=True)
        # One maker does, where a test does not say: each costs seconds to start here.
        table = "" if "[daemon]" in settings else "[daemon]\nbuilders = 1\n"
        SETTINGS.write_text(table + settings)
        self._launch: Callable[..., subprocess.Popen[Any]] = (
            partial(subprocess.Popen, ["chaosd", *OPTIONS])
            if installed
            else partial(programs.start, "chaosd", *OPTIONS, code=code)
        )
        self.start()

    def start(self) -> None:
        """Start it, and wait until it serves."""
        notify = Path("/run/chaosd-test-notify")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            notify.unlink(missing_ok=True)
            manager.bind(str(notify))
            manager.settimeout(1)
            environment = {**os.environ, "NOTIFY_SOCKET": str(notify)}
            with LOG.open("ab") as log:
                self.process = self._launch(stderr=log, env=environment)
            wait_for(partial(self._ready, manager), "chaosd does not start")

    def _ready(self, manager: socket.socket) -> bool:
        assert self.process.poll() is None, LOG.read_text()
        try:
            return manager.recv(100) == b"READY=1"
        except TimeoutError:
            return False

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """End it without a warning."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it as a service manager does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(PATIENCE) == 0, LOG.read_text()

    def makers(self) -> list[int]:
        """The processes that make its shells."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        names = {int(pid): Path(f"/proc/{pid}/comm").read_text() for pid in children}
        return [pid for pid, name in names.items() if name == "chaosd-maker\n"]


@contextlib.contextmanager
def running(settings: str = "", code: str = "", *, installed: bool = False) -> Iterator[Chaosd]:
    """A daemon for the length of a block; its guests are destroyed at the end."""
    daemon = Chaosd(settings, code, installed=installed)
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            with Chaos() as chaos:
                chaos.call("destroy", all=True)
            daemon.stop()


def filled(chaos: Chaos, name: str | None = None) -> list[dict[str, Any]]:
    """Wait until the pool is full; its flavours."""
    flavours = chaos.call("pool.list")

    def full() -> bool:
        wanted = [f for f in flavours if name in {None, f["name"]}]
        return all(f["ready"] >= f["size"] for f in wanted)

    deadline = time.monotonic() + PATIENCE
    while not full():
        assert time.monotonic() < deadline, flavours
        time.sleep(0.02)
        flavours = chaos.call("pool.list")
    return flavours


def create(chaos: Chaos, name: str, path: str = HELLO, *overrides: str, **more: Any) -> Any:
    kernel = f'kernel="{GUESTS}/{Path(path).stem}.elf"'
    return chaos.call("create", path=path, overrides=[kernel, *overrides, f'name="{name}"'], **more)


def served(chaos: Chaos, flavour: str) -> int:
    return int(next(f["served"] for f in chaos.call("pool.list") if f["name"] == flavour))


def page_of(host: Host, uuid: str) -> Any:
    """The device page as the guest sees it, its first page."""
    record = Registry().read(uuid)
    assert record is not None
    with host.memory.map(record.domid, [record.store_frame]) as mapping:
        return decode(bytes(mapping.view))


def network_state() -> str:
    """What Dom0 knows of its neighbours and of netback's rings, and what the guests said."""

    def said(*command: str) -> str:
        return subprocess.run(command, check=False, capture_output=True, text=True).stdout

    told = [said("ip", "neighbour"), said("bridge", "fdb", "show"), said("ip", "-s", "link")]
    debugfs = Path("/sys/kernel/debug")
    said("mount", "-t", "debugfs", "none", str(debugfs))
    rings = sorted(debugfs.glob("xen-netback/*/*"))
    told += [f"{ring}:\n{ring.read_text()}" for ring in rings]
    with contextlib.suppress(ChaosError), Chaos() as chaos:
        for guest in chaos.call("list")[1:]:
            log = chaos.call("logs", domain=guest["name"]).decode(errors="replace")
            told.append(f"{guest}:\n{log[-2000:]}")
    return "\n".join(told)
