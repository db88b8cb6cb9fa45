"""vif-xendevd, the script, and what xendevd tells the service manager."""

import os
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from noxsd_process import Noxsd

from noxs import hotplug
from noxs.bus import Bus
from noxs.daemon import notify_manager
from xendevd import xl

PATH = "backend/vif/1/0"
STATUS, ERROR = f"{PATH}/{hotplug.STATUS}", f"{PATH}/{hotplug.ERROR_TEXT}"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = Noxsd(tmp_path_factory.mktemp("bus")).start()
    yield server.socket
    server.kill()


@pytest.fixture
def bus(store: str) -> Iterator[Bus]:
    with Bus.connect(store) as connected:
        connected.rm("backend")
        yield connected


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "running", lambda: True)


def later(store: str, *pairs: tuple[str, str]) -> threading.Thread:
    """Write the nodes once somebody may be waiting for them."""

    def body() -> None:
        with Bus.connect(store) as other:
            other.write_many(pairs)

    thread = threading.Timer(0.05, body)
    thread.start()
    return thread


@pytest.mark.usefixtures("running")
def test_it_waits_for_the_verdict(bus: Bus, store: str) -> None:
    bus.write(STATUS, "")
    thread = later(store, (STATUS, "connected"))
    assert xl.online(bus, PATH) == ""
    thread.join()
    bus.write(STATUS, "")
    thread = later(store, (ERROR, "there is no bridge"), (STATUS, "error"))
    assert xl.online(bus, PATH) == "there is no bridge"
    thread.join()


@pytest.mark.usefixtures("running")
def test_it_does_not_wait_for_ever(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xl, "PATIENCE", 0.05)
    bus.write(STATUS, "")
    assert "after 0.05 s" in xl.online(bus, PATH)
    assert "xendevd" in bus.read(ERROR)


def test_without_xendevd(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "running", lambda: False)
    bus.write(STATUS, "")
    assert "xendevd is not running" in xl.online(bus, PATH)
    assert "xendevd is not running" in bus.read(ERROR)
    bus.write(STATUS, "connected")
    assert xl.online(bus, PATH) == ""


def command(monkeypatch: pytest.MonkeyPatch, *words: str, path: str | None = PATH) -> object:
    monkeypatch.setattr(sys, "argv", ["vif-xendevd", *words])
    if path is None:
        monkeypatch.delenv("XENBUS_PATH", raising=False)
    else:
        monkeypatch.setenv("XENBUS_PATH", path)
    with pytest.raises(SystemExit) as left:
        xl.main()
    return left.value.code


@pytest.mark.usefixtures("running")
def test_the_command(bus: Bus, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOXS_BUS", store)
    assert command(monkeypatch, "offline", "type_if=vif") == 0
    assert "XENBUS_PATH is not set" in str(command(monkeypatch, "online", path=None))
    bus.write(STATUS, "connected")
    assert command(monkeypatch, "online", "type_if=vif") == 0
    bus.write_many([(STATUS, "error"), (ERROR, "no such bridge")])
    assert "no such bridge" in str(command(monkeypatch, "online", "type_if=vif"))


def test_taps_are_vif_bridges(monkeypatch: pytest.MonkeyPatch) -> None:
    class Executed(Exception):
        pass

    def execv(path: str, argv: list[str]) -> None:
        assert [path, *argv[1:]] == [xl.VIF_BRIDGE, "add", "type_if=tap"]
        raise Executed

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["vif-xendevd", "add", "type_if=tap"])
    with pytest.raises(Executed):
        xl.main()


def test_systemd_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notify_manager("READY=1")
        assert manager.recv(100) == b"READY=1"
    notify_manager("STOPPING=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify_manager("READY=1")
