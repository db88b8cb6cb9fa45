"""What every Dom0 of the lab has, seen from inside, and that its processor can be trusted."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
import pytest

import chaos

if TYPE_CHECKING:
    from collections.abc import Iterator

XEN = {"bookworm": ("4.17", "6.1."), "trixie": ("4.20", "6.12.")}


def run(*words: str) -> str:
    done = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{words}: {done.stderr}"
    return done.stdout


def processes() -> set[str]:
    names = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.add(path.read_text().strip())
        except OSError:
            continue
    return names


@pytest.mark.anyhost
def test_a_stock_release() -> None:
    facts = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line
    )
    xen, linux = XEN[facts["VERSION_CODENAME"]]
    version = Path("/sys/hypervisor/version")
    assert ".".join((version / n).read_text().strip() for n in ("major", "minor")) == xen
    assert os.uname().release.startswith(linux)
    assert "control_d" in Path("/proc/xen/capabilities").read_text()


@pytest.mark.anyhost
def test_the_host_folders() -> None:
    assert Path("/src/pyproject.toml").is_file()
    with pytest.raises(OSError, match="Read-only"):
        Path("/src/written-by-dom0").touch()
    probe = Path(f"/out/probe-{os.getpid()}")
    probe.write_text("x")
    probe.unlink()


@pytest.mark.anyhost
def test_the_project_is_installed_from_its_wheel() -> None:
    assert chaos.__file__ in {str(f.locate()) for f in importlib.metadata.files("chaos-xen") or ()}
    assert "dist-packages" in str(chaos.__file__)
    assert Path("/usr/local/bin/chaos").is_file()
    for name in ("msgpack", "pyudev", "pyroute2", "rich"):
        module = __import__(name)
        assert str(module.__file__).startswith("/usr/lib/python3/dist-packages/")


@pytest.mark.anyhost
def test_the_bridge() -> None:
    (link,) = json.loads(run("ip", "-j", "-d", "address", "show", "xenbr0"))
    assert link["linkinfo"]["info_kind"] == "bridge"
    assert "UP" in link["flags"]
    addresses = [(a["local"], a["prefixlen"]) for a in link["addr_info"] if a["family"] == "inet"]
    assert addresses == [("10.77.0.1", 24)]


@pytest.mark.anyhost
def test_back_ends_and_devices_are_there() -> None:
    for node in ("evtchn", "gntdev", "gntalloc", "privcmd", "xenbus_backend"):
        assert Path("/dev/xen", node).is_char_device()
    loaded = {line.split()[0] for line in Path("/proc/modules").read_text().splitlines()}
    assert loaded >= {"xen_netback", "xen_blkback", "bridge", "tun", "loop"}


@pytest.mark.anyhost
def test_udev_tells_its_listeners() -> None:
    import pyudev

    monitor = pyudev.Monitor.from_netlink(pyudev.Context())
    monitor.filter_by("net")
    monitor.start()
    run("ip", "link", "add", "probe0", "type", "dummy")
    try:
        device = monitor.poll(timeout=30)
        assert device is not None
        assert (device.action, device.sys_name) == ("add", "probe0")
    finally:
        run("ip", "link", "delete", "probe0")


def test_nothing_of_xenstored_runs() -> None:
    assert not processes() & {"xenstored", "oxenstored", "xenconsoled"}
    assert int(Path("/proc/xen/xsd_port").read_text()) > 0
    assert not Path("/run/xenstored/socket").exists()


@pytest.mark.xenstored
def test_xl_works() -> None:
    assert processes() >= {"xenstored", "xenconsoled"}
    assert "Domain-0" in run("xl", "list")
    assert run("xenstore-read", "/local/domain/0/name") == "Domain-0\n"


@pytest.mark.systemd
def test_systemd_boots_the_same_host() -> None:
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    test_the_bridge()
    test_the_host_folders()
    test_back_ends_and_devices_are_there()
    test_nothing_of_xenstored_runs()
    assert run("systemctl", "list-units", "--failed", "--plain", "--no-legend") == ""


@pytest.fixture
def busy_guests(tmp_path: Path) -> Iterator[list[str]]:
    """Two guests that compute all the time, and check what they compute."""
    names = [f"busy{number}" for number in (1, 2)]
    for name in names:
        config = tmp_path / f"{name}.cfg"
        config.write_text(
            f'name = "{name}"\nkernel = "/src/guests/build/spin.elf"\nmemory = 8\nvcpus = 1\n'
        )
    made: list[str] = []
    try:
        for name in names:
            command.chaos("create", "-q", str(tmp_path / f"{name}.cfg"))
            made.append(name)
        yield made
    finally:
        if made:
            command.chaos("destroy", *made)


def cpu_seconds(names: list[str]) -> list[float]:
    domains: list[dict[str, Any]] = json.loads(command.chaos("list", "--json").stdout)
    return [domain["cpu_seconds"] for domain in domains if domain["name"] in names]


def test_registers_survive_busy_guests(busy_guests: list[str], tmp_path: Path) -> None:
    """Dom0 and two guests share the processors' vector registers: none may see another's.

    An emulated processor that offers AVX and XSAVE gives several sums here. It takes a
    hash that uses those registers: OpenSSL's, which is Python's; coreutils' does not.
    """
    file = tmp_path / "data"
    file.write_bytes(os.urandom(2 << 20))
    before = cpu_seconds(busy_guests)
    sums = Counter(hashlib.sha256(file.read_bytes()).hexdigest() for _ in range(100))
    assert list(sums.values()) == [100]
    after = cpu_seconds(busy_guests)
    assert len(after) == 2
    assert all(now > then + 1 for now, then in zip(after, before, strict=True)), (before, after)
    for name in busy_guests:
        command.chaos("pause", name)  # it has done its part
        said = command.chaos("console", name, stdin=subprocess.DEVNULL).stdout
        assert "spin: sums" in said
        assert "CORRUPT" not in said
