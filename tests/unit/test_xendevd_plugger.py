"""From events to verdicts, with a real store, real links and no kernel events."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from netns import in_namespace, tap
from noxsd_process import Noxsd

from noxs import hotplug, lockfile
from noxs.bus import Bus
from noxs.hotplug import BusError
from xendevd.monitor import OFFLINE, ONLINE, Monitor, VifEvent, present, translate
from xendevd.netlink import Link, Rtnetlink
from xendevd.openvswitch import OpenVSwitch
from xendevd.plugger import Plugger

NOWHERE = ("/nonexistent/db.sock",)


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


class Bench:
    """A plugger in a namespace, with a bridge br0."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.route = Rtnetlink()
        self.lines: list[str] = []
        self.fds: list[int] = []
        self.plugger = Plugger(bus, self.route, OpenVSwitch(NOWHERE), self.log)
        subprocess.run(["ip", "link", "add", "br0", "type", "bridge"], check=True)

    def log(self, text: str, *, level: int = 6) -> None:
        self.lines.append(text)

    def vif(self, domid: int, devid: int = 0, *, device: bool = True, **nodes: str) -> VifEvent:
        path, name = f"backend/vif/{domid}/{devid}", f"vif{domid}.{devid}"
        nodes = {"script": "vif-xendevd", "bridge": "br0", "frontend-id": str(domid), **nodes}
        nodes |= {hotplug.STATUS: hotplug.PENDING, "frontend": f"/local/domain/{domid}/device"}
        self.bus.write_many([(f"{path}/{key}", value) for key, value in nodes.items()])
        if device:
            self.fds.append(tap(name))
        return VifEvent(ONLINE, path, name)

    def link(self, name: str) -> Link:
        link = self.route.link(name)
        assert link is not None
        return link

    def status(self, event: VifEvent) -> tuple[str | None, str | None]:
        status, error = self.bus.read_many(
            [f"{event.path}/{hotplug.STATUS}", f"{event.path}/{hotplug.ERROR_TEXT}"]
        )
        return status, error

    def close(self) -> None:
        self.route.close()
        for fd in self.fds:
            os.close(fd)


def bench(bus: Bus, body: Callable[[Bench], None]) -> None:
    def prepared() -> None:
        made = Bench(bus)
        try:
            body(made)
        finally:
            made.close()

    in_namespace(prepared)


def test_a_vif_is_plugged(bus: Bus) -> None:
    def body(b: Bench) -> None:
        event = b.vif(1, vifname="web0", mtu="1400")
        b.plugger.handle([event])
        assert b.status(event) == ("connected", None)
        link = b.link("web0")
        assert (link.master, link.up, link.mtu) == (b.link("br0").ifindex, True, 1400)
        assert bus.get("/local/domain/1/device/mtu") is None
        assert (b.plugger.plugged, b.plugger.failed) == (1, 0)

    bench(bus, body)


def test_verdicts_are_each_vifs_own(bus: Bus) -> None:
    def body(b: Bench) -> None:
        good, taken = b.vif(1), b.vif(2, vifname="vif1.0")
        nowhere, odd = b.vif(3, bridge="br7"), b.vif(4, mtu="soon")
        b.plugger.handle([good, taken, nowhere, odd])
        assert b.status(good) == ("connected", None)
        for event, why in (
            (taken, "vifname 'vif1.0': an interface of that name exists (choose another vifname)"),
            (nowhere, "there is no bridge 'br7' (ip link add br7 type bridge)"),
            (odd, "mtu 'soon' is not within 68 to 65517 bytes"),
        ):
            assert b.status(event) == ("error", why)
        assert b.plugger.failed == 3
        assert len(b.lines) == 3

    bench(bus, body)


def test_a_burst_is_one_plug_for_each_vif(bus: Bus) -> None:
    def body(b: Bench) -> None:
        events = [b.vif(domid) for domid in range(1, 101)]
        b.plugger.handle([*events, *events, *events])
        assert all(b.status(event) == ("connected", None) for event in events)
        assert b.plugger.plugged == 100

    bench(bus, body)


def test_the_newest_event_counts(bus: Bus) -> None:
    def body(b: Bench) -> None:
        event = b.vif(1)
        b.plugger.handle([event, event._replace(action=OFFLINE)])
        assert b.status(event) == ("", None)
        b.plugger.handle([event._replace(action=OFFLINE), event])
        assert b.status(event) == ("connected", None)

    bench(bus, body)


def test_nothing_is_written_for_a_vif_that_is_gone(bus: Bus) -> None:
    def body(b: Bench) -> None:
        no_device, no_nodes = b.vif(1, device=False), b.vif(2)
        bus.rm(no_nodes.path)
        b.plugger.handle([no_device, no_nodes])
        assert b.status(no_device) == ("", None)
        assert bus.get(no_nodes.path) is None
        late = b.vif(3, bridge="br7")
        b.plugger._verdicts.append((late.path, BusError("late"), 0))
        bus.rm(late.path)
        b.plugger.report()
        assert bus.get(late.path) is None

    bench(bus, body)


def test_beside_libxl(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plugger, "alone", property(lambda _: False))

    def body(b: Bench) -> None:
        ours = b.vif(1, script="/usr/local/bin/vif-xendevd")
        theirs = b.vif(2, script="/etc/xen/scripts/vif-bridge")
        b.plugger.handle([ours, theirs])
        assert b.status(ours) == ("connected", None)
        assert bus.get("/local/domain/1/device/mtu") == "1500"
        assert b.status(theirs) == ("", None)
        assert b.link("vif2.0").master == 0

    bench(bus, body)


def test_catching_up_leaves_alone_what_is_plugged(bus: Bus) -> None:
    def body(b: Bench) -> None:
        events = [b.vif(domid) for domid in range(1, 41)]
        b.plugger.handle(events[:10])
        assert b.plugger.pending(events) == events[10:]

    bench(bus, body)


def test_uevents_of_vifs() -> None:
    properties = {"XENBUS_TYPE": "vif", "XENBUS_PATH": "backend/vif/1/0", "vif": "vif1.0"}
    assert translate("online", properties) == VifEvent(ONLINE, "backend/vif/1/0", "vif1.0")
    assert translate("offline", properties) == VifEvent(OFFLINE, "backend/vif/1/0", "vif1.0")
    assert translate("remove", properties) == VifEvent(OFFLINE, "backend/vif/1/0", "")
    assert translate("add", properties) is None
    assert translate("online", {**properties, "XENBUS_TYPE": "vbd"}) is None
    assert translate("online", {}) is None


def test_vifs_in_sysfs(tmp_path: Path) -> None:
    assert present(str(tmp_path / "none")) == []
    for name, interface in (("vif-1-0", "web0"), ("vif-2-0", ""), ("vbd-1-51712", "")):
        device = tmp_path / name
        (device / "net" / interface).mkdir(parents=True)
        (device / "nodename").write_text(f"backend/{name.replace('-', '/')}\n")
    (tmp_path / "vif-3-0").mkdir()
    assert present(str(tmp_path)) == [VifEvent(ONLINE, "backend/vif/1/0", "web0")]


def test_the_monitor_hears_the_kernel() -> None:
    try:
        monitor = Monitor("net")
    except OSError as error:
        pytest.skip(f"no uevents: {error}")
    with pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []

        def remember(action: str, properties: dict[str, str]) -> None:
            seen.append(f"{action} {properties.get('INTERFACE')}")

        patch.setattr("xendevd.monitor.translate", remember)
        try:
            Path("/sys/class/net/lo/uevent").write_text("online")
        except OSError as error:
            pytest.skip(f"no synthetic uevents: {error}")
        assert monitor.read() == ([], False)
        assert seen == ["online lo"]


def test_one_xendevd_and_others_see_it(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    assert not hotplug.running(path)
    fd = lockfile.take(path, "xendevd")
    assert hotplug.running(path)
    with pytest.raises(BusError, match="another xendevd"):
        lockfile.take(path, "xendevd", wait=0)
    os.close(fd)
    assert not hotplug.running(path)
