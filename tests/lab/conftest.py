"""Tests that run in Dom0 of a lab: which ones belong to the boot that we are in.

A test without a mark runs on a host without xenstored; marks say otherwise:

    xenstored   only on a host that runs xenstored
    anyhost     on a host without xenstored and on one with it
    systemd     only on a host whose first process is systemd

Where a test tries every step or many rounds, it takes a sample of them, of each day another, unless
pytest was given ``--thorough``; tests marked ``thorough`` are left out without it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from daemons import (
    end,
    ensure_bus,
    ensure_xendevd,
    noxsd_pid,
    openvswitch,
    serves,
    start,
    stop_xendevd,
)
from guest import making
from sampling import DAY, MARK, sample
from stock import unpacked
from waiting import wait_for

from chaos.host import Host
from chaos.registry import Registry
from noxs.bus import Bus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from guest import Guest

MARKS = {
    "xenstored": "runs on a host with xenstored",
    "anyhost": "runs on a host with xenstored and on one without",
    "systemd": "runs on a host booted by systemd",
}


def host_kind() -> str:
    """What this host is: "noxs", "xenstored", "systemd", or "" outside Dom0."""
    if not Path("/proc/xen/xsd_port").exists():
        return ""
    if Path("/run/systemd/system").is_dir() and Path("/proc/1/comm").read_text() == "systemd\n":
        return "systemd"
    running = subprocess.run(
        ["pgrep", "-x", "xenstored|oxenstored"], check=False, capture_output=True
    )
    return "xenstored" if running.returncode == 0 else "noxs"


def belongs(item: pytest.Item, kind: str) -> bool:
    marks = {mark.name for mark in item.iter_markers()} & MARKS.keys()
    if not marks:
        return kind == "noxs"
    return kind in marks or ("anyhost" in marks and kind in ("noxs", "xenstored"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--thorough", action="store_true", help="every step and every round, not a sample of them"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}: runs only with --thorough")
    config.addinivalue_line("markers", "every_release: repeated on every release of Debian")
    for name, text in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {text}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kind = host_kind()
    if not kind:
        if not config.option.collectonly:
            raise pytest.UsageError("tests/lab runs in Dom0: scripts/test lab")
        return
    thorough = config.getoption("thorough")
    others = [
        item
        for item in items
        if not belongs(item, kind) or (item.get_closest_marker(MARK) and not thorough)
    ]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Show what failed at once: if the lab breaks down, there is no summary."""
    if report.failed:
        print(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext}", flush=True)  # noqa: T201 -- it is what the reader sees


def pytest_report_header() -> str:
    version = Path("/sys/hypervisor/version")
    xen = ".".join((version / part).read_text().strip() for part in ("major", "minor"))
    return f"host: Xen {xen}, {os.uname().release}, {host_kind()}; samples of CHAOS_TEST_DAY={DAY}"


@pytest.fixture
def thorough(request: pytest.FixtureRequest) -> bool:
    """Whether everything is to be tried, however long it takes."""
    return bool(request.config.getoption("thorough"))


@pytest.fixture
def some(thorough: bool) -> Callable[[Sequence[str]], Sequence[str]]:
    """A function that picks from steps which ones to try."""
    return (lambda steps: steps) if thorough else sample


@pytest.fixture
def network() -> None:
    """A bus and a xendevd, for the rest of this boot where none run."""
    ensure_bus()
    ensure_xendevd()


@pytest.fixture
def make() -> Iterator[Callable[..., Guest]]:
    """A function that makes guests, which end with the test."""
    with making() as make:
        yield make


@pytest.fixture
def no_xendevd() -> Iterator[None]:
    """A host on which xendevd does not run, until the test is over."""
    stop_xendevd()
    yield
    ensure_xendevd()


@pytest.fixture(name="openvswitch")
def running_openvswitch() -> Iterator[str]:
    """Open vSwitch, and the name of its bridge."""
    with openvswitch() as bridge:
        yield bridge


@pytest.fixture
def restart_noxsd() -> Callable[[], None]:
    """A function that kills noxsd and starts it again. A host with xenstored has none."""
    if host_kind() == "xenstored":
        pytest.skip("xenstored does not survive a kill")

    def restart() -> None:
        end(noxsd_pid(), signal.SIGKILL)
        start("noxsd")
        wait_for(serves, "noxsd does not start again")

    return restart


@pytest.fixture(scope="session")
def linux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The host's own kernel, for guests."""
    return unpacked(tmp_path_factory.mktemp("linux"))


@pytest.fixture
def host() -> Iterator[Host]:
    """The hypervisor's handles."""
    with Host() as opened:
        yield opened


@pytest.fixture
def nothing_left(host: Host) -> Iterator[None]:
    """A test that leaves nothing behind of its guests."""
    from test_vif import Traces

    Registry().prepare()
    with Bus.connect() as bus:
        traces = Traces(host, bus)
        yield
        traces.gone()
