"""xendevd on a real Dom0: netback's vifs, blkback's disks, the kernel's events, real bridges.

No guest is needed: netback makes an interface as soon as its nodes exist, blkback opens a device as
soon as it is told which, and both wait with the rest for a frontend that never comes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest
from daemons import ensure_bus, loops, start, stop_xendevd
from waiting import wait_for

from noxs import blockdev, hotplug
from noxs.bus import Bus
from xendevd.netlink import Link, Rtnetlink

if TYPE_CHECKING:
    from collections.abc import Iterator

PATIENCE = 60.0
VERDICTS = {hotplug.CONNECTED, hotplug.ERROR}


@pytest.fixture(scope="module")
def bus() -> Iterator[Bus]:
    """The host's store; noxsd is started, for the rest of this boot, where there is none."""
    ensure_bus()
    with Bus.connect() as connected:
        yield connected


class Xendevd:
    """The daemon, and the vifs that it is given."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.route = Rtnetlink()
        self.made: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        stop_xendevd()
        self.process = subprocess.Popen(["xendevd"])
        wait_for(hotplug.running, "xendevd does not start")

    def stop(self, with_signal: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(with_signal)
        code = self.process.wait(PATIENCE)
        self.process = None
        return code

    def vif(self, domid: int, devid: int = 0, **nodes: str) -> str:
        """Write the nodes of a vif whose frontend is there but does not connect; its backend."""
        return self.vifs([(domid, devid, nodes)])[0]

    def vifs(self, wanted: list[tuple[int, int, dict[str, str]]]) -> list[str]:
        paths = []
        with self.bus.transaction() as nodes:
            for domid, devid, more in wanted:
                front = f"/local/domain/{domid}/device/vif/{devid}"
                back = f"/local/domain/0/backend/vif/{domid}/{devid}"
                mac = f"00:16:3e:77:{domid >> 8 & 255:02x}:{domid & 255:02x}"
                both = {"handle": str(devid), "mac": mac, "state": "1"}
                frontend = {**both, "backend": back, "backend-id": "0"}
                backend = {
                    **both,
                    "frontend": front,
                    "frontend-id": str(domid),
                    "online": "1",
                    "bridge": "xenbr0",
                    "script": "vif-xendevd",
                    hotplug.STATUS: hotplug.PENDING,
                    **more,
                }
                nodes.write_many([(f"{front}/{key}", value) for key, value in frontend.items()])
                nodes.write_many([(f"{back}/{key}", value) for key, value in backend.items()])
                paths.append(back)
        self.made += paths
        return paths

    def vbd(self, domid: int, target: Path | str, mode: str = "w") -> str:
        """The same for a disk."""
        front = f"/local/domain/{domid}/device/vbd/51712"
        back = f"/local/domain/0/backend/vbd/{domid}/51712"
        target = Path(target)
        backend = {
            "frontend": front,
            "frontend-id": str(domid),
            "online": "1",
            "dev": "xvda",
            "type": "phy" if target.is_block_device() else "file",
            "params": str(target),
            "mode": mode,
            "script": hotplug.BLOCK_SCRIPT,
            hotplug.IDENTITY: blockdev.identity(target.stat()) if target.exists() else "",
            hotplug.STATUS: hotplug.PENDING,
            "state": "1",
        }
        frontend = {"backend": back, "backend-id": "0", "state": "1"}
        with self.bus.transaction() as nodes:
            nodes.write_many([(f"{front}/{key}", value) for key, value in frontend.items()])
            nodes.write_many([(f"{back}/{key}", value) for key, value in backend.items()])
        self.made.append(back)
        return back

    def verdict(self, path: str) -> str:
        """Wait for the verdict: "" or the error."""
        status = self.bus.wait_for(f"{path}/{hotplug.STATUS}", VERDICTS.__contains__, PATIENCE)
        if status == hotplug.CONNECTED:
            return ""
        return self.bus.read(f"{path}/{hotplug.ERROR_TEXT}")

    def link(self, name: str) -> Link:
        link = self.route.link(name)
        assert link is not None
        return link

    def remove(self, *paths: str) -> None:
        """Remove vifs and wait until their interfaces are gone."""
        self.bus.rm_many(
            "/local/domain/{2}/device/{1}/{3}".format(*path.rsplit("/", 3)) for path in paths
        )
        self.bus.rm_many(paths)
        self.made = [path for path in self.made if path not in paths]
        devices = [Path(f"/sys/devices/{device(path)}") for path in paths]
        wait_for(lambda: not any(map(Path.exists, devices)), "netback keeps its device")
        for parent in {path.rpartition("/")[0] for path in paths}:
            self.bus.rm_many([parent, f"/local/domain/{parent.rpartition('/')[2]}"])


def device(path: str) -> str:
    return "{1}-{2}-{3}".format(*path.rsplit("/", 3))


@pytest.fixture
def daemon(bus: Bus) -> Iterator[Xendevd]:
    made = Xendevd(bus)
    made.start()
    try:
        yield made
    finally:
        made.remove(*made.made)
        if made.process is not None:
            made.stop()
        made.route.close()


@pytest.mark.every_release
def test_udev_runs_no_program_for_a_vif(daemon: Xendevd) -> None:
    """By the rule that chaos-units writes; for other interfaces it does."""
    assert daemon.verdict(daemon.vif(902, vifname="web1")) == ""
    for name, expected in (("web1", False), ("xenbr0", True)):
        told = subprocess.run(
            ["udevadm", "test", "--action=add", f"/sys/class/net/{name}"],
            check=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # the rules that were read, also those without effect
            text=True,
        ).stdout
        assert ("systemd-sysctl" in told) == expected, told


@pytest.mark.anyhost
def test_a_vif_is_plugged_and_goes(daemon: Xendevd) -> None:
    path = daemon.vif(901, vifname="web0", mtu="1400")
    assert daemon.verdict(path) == ""
    link = daemon.link("web0")
    assert (link.up, link.mtu, link.master) == (True, 1400, daemon.link("xenbr0").ifindex)
    assert "web0" not in Path("/proc/net/if_inet6").read_text()
    daemon.remove(path)
    assert daemon.route.link("web0") is None
    assert daemon.bus.get(path) is None


@pytest.mark.anyhost
def test_failures_reach_whoever_waits(daemon: Xendevd) -> None:
    good = daemon.vif(901)
    assert daemon.verdict(good) == ""
    for domid, nodes, why in (
        (902, {"bridge": "nowhere0"}, "there is no bridge 'nowhere0'"),
        (903, {"vifname": "vif901.0"}, "an interface of that name exists"),
        (904, {"mtu": "17"}, "mtu '17' is not within"),
        (905, {"vlan": "10"}, "does not filter VLANs"),
    ):
        assert why in daemon.verdict(daemon.vif(domid, **nodes))


@pytest.mark.anyhost
def test_it_keeps_two_capabilities(daemon: Xendevd) -> None:
    daemon.verdict(daemon.vif(901))
    assert daemon.process is not None
    status = Path(f"/proc/{daemon.process.pid}/status").read_text()
    values = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Cap"))
    kept = f"{1 << 12 | 1 << 1:016x}"  # CAP_NET_ADMIN, CAP_DAC_OVERRIDE
    assert values["CapEff"] == values["CapPrm"] == values["CapBnd"] == kept
    assert values["CapInh"] == values["CapAmb"] == f"{0:016x}"


class Forks:
    """Who creates processes, by the kernel's own trace of it (events/sched/sched_process_fork)."""

    EVENT = re.compile(r"sched_process_fork: comm=(.*) pid=(\d+) child_comm=.* child_pid=(\d+)$")
    TRACEFS = Path("/sys/kernel/tracing")

    def __init__(self) -> None:
        if not (self.TRACEFS / "trace").exists():
            subprocess.run(["mount", "-t", "tracefs", "tracefs", self.TRACEFS], check=True)
        self.instance = self.TRACEFS / "instances" / "forks"
        self.instance.mkdir(exist_ok=True)
        self.enable = self.instance / "events/sched/sched_process_fork/enable"
        self.enable.write_text("1")

    def close(self) -> None:
        self.enable.write_text("0")
        self.instance.rmdir()

    def clear(self) -> None:
        (self.instance / "trace").write_text("")

    def all(self) -> list[tuple[str, int, int]]:
        """Every process made: its parent's name and number, and its own."""
        found = map(self.EVENT.search, (self.instance / "trace").read_text().splitlines())
        return [(m[1], int(m[2]), int(m[3])) for m in found if m]

    def of(self, ancestor: int) -> list[tuple[str, int, int]]:
        """Those that ``ancestor`` made, or the kernel to run a program: its workers do that."""
        family = {ancestor}
        events = []
        for event in self.all():
            if event[1] in family or event[0].startswith("kworker/"):
                family.add(event[2])
                events.append(event)
        return events


@pytest.fixture
def forks() -> Iterator[Forks]:
    """The trace; udevd, to which xendevd does not listen, is kept from forking for every event."""
    made = Forks()
    subprocess.run(["udevadm", "control", "--stop-exec-queue"], check=False)
    yield made
    subprocess.run(["udevadm", "control", "--start-exec-queue"], check=False)
    made.close()


def test_plugs_create_no_process(forks: Forks, daemon: Xendevd, thorough: bool) -> None:
    count = 100 if thorough else 30
    subprocess.run(["true"], check=True)
    assert os.getpid() in {parent for _, parent, _ in forks.all()}
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)
    paths = daemon.vifs([(1000 + n, 0, {}) for n in range(count)])
    names = ["vif{1}.{2}".format(*path.rsplit("/", 2)) for path in paths]
    wait_for(lambda: all(map(daemon.route.link, names)), "netback is slow")
    forks.clear()
    daemon.process.send_signal(signal.SIGCONT)
    assert [daemon.verdict(path) for path in paths] == [""] * count
    assert forks.of(daemon.process.pid) == []


@pytest.mark.anyhost
def test_it_catches_up_after_a_crash(daemon: Xendevd) -> None:
    first = daemon.vif(901)
    assert daemon.verdict(first) == ""
    daemon.stop(signal.SIGKILL)
    assert not hotplug.running()
    missed = daemon.vifs([(910 + n, 0, {}) for n in range(20)])
    wait_for(lambda: daemon.route.link("vif929.0"), "netback is slow")
    daemon.start()
    assert [daemon.verdict(path) for path in [first, *missed]] == [""] * 21
    assert daemon.stop() == 0


def test_it_outlives_the_store(daemon: Xendevd) -> None:
    assert daemon.verdict(daemon.vif(901)) == ""
    subprocess.run(["pkill", "-KILL", "-x", "noxsd"], check=True)
    start("noxsd")
    assert daemon.verdict(daemon.vif(902)) == ""
    assert "there is no bridge" in daemon.verdict(daemon.vif(903, bridge="nowhere0"))
    assert daemon.process is not None
    assert daemon.process.poll() is None


def opened(path: str) -> str:
    """The numbers of what blkback has open for a disk, once it has."""
    attribute = Path(f"/sys/devices/{device(path)}/physical_device")
    wait_for(attribute.exists, "blkback does not open the device")
    return attribute.read_text().strip()


@pytest.mark.anyhost
def test_disks_get_loop_devices_and_lose_them(daemon: Xendevd, forks: Forks) -> None:
    """Through a kill, for files of other users, without a process; and what is refused."""
    with TemporaryDirectory(dir="/var/tmp") as directory:  # where direct I/O works
        disks_come_and_go(daemon, forks, Path(directory))


def disks_come_and_go(daemon: Xendevd, forks: Forks, tmp_path: Path) -> None:
    before = loops()
    image, other = tmp_path / "image", tmp_path / "other"
    for path in (image, other):
        path.write_bytes(bytes(1 << 20))
    os.chown(other, 1234, 1234)
    other.chmod(0o600)
    (tmp_path / "link").hardlink_to(image)
    assert daemon.process is not None
    forks.clear()
    first = daemon.vbd(901, image)
    second = daemon.vbd(902, other, "r")
    assert [daemon.verdict(path) for path in (first, second)] == ["", ""]
    assert forks.of(daemon.process.pid) == []
    name = f"loop{int(opened(first).partition(':')[2], 16)}"
    assert loops()[name] == str(image)
    assert Path(f"/sys/block/{name}/ro").read_text().strip() == "0"
    assert Path(f"/sys/block/{name}/loop/dio").read_text().strip() == "1"
    assert opened(second) != opened(first)
    whole = Path("/proc/self/mounts").read_text().split()[0]
    for domid, target, mode, why in (
        (903, tmp_path / "link", "r", "is a disk of domain 901"),
        (904, f"/dev/{name}", "w", "is a disk of domain 901"),
        (905, other, "w", "is a disk of domain 902"),
        (906, whole if whole.startswith("/dev/") else "/dev/vda", "r", "is in use"),
        (907, tmp_path / "missing", "w", "No such file"),
    ):
        assert why in daemon.verdict(daemon.vbd(domid, target, mode))
    assert daemon.verdict(daemon.vbd(908, other, "r")) == ""
    daemon.stop(signal.SIGKILL)
    assert loops()[name] == str(image)
    daemon.remove(second)
    late = daemon.vbd(909, other, "r")
    daemon.start()
    assert daemon.verdict(late) == ""
    assert daemon.bus.read(f"{first}/physical-device") == f"7:{name.removeprefix('loop')}"
    # blkback may not have closed yet what was removed while nobody looked after it.
    left = sorted([*before.values(), str(image), *[str(other)] * 2])
    wait_for(lambda: sorted(loops().values()) == left, f"not {left}: {loops()}")
    daemon.remove(*daemon.made)
    wait_for(lambda: loops() == before, f"a loop device stays: {loops()}")


@pytest.mark.anyhost
def test_a_vif_that_goes_at_once_leaves_no_nodes(daemon: Xendevd, thorough: bool) -> None:
    for _ in range(20 if thorough else 10):
        path = daemon.vif(901)
        # netback's probe writes nodes too: only after it is the vif xendevd's alone.
        daemon.bus.wait_for(f"{path}/state", "2".__eq__, PATIENCE)
        daemon.remove(path)
        assert daemon.bus.get(path) is None


@pytest.mark.anyhost
def test_vlans_of_a_linux_bridge(daemon: Xendevd) -> None:
    subprocess.run(
        ["ip", "link", "add", "vlbr0", "type", "bridge", "vlan_filtering", "1"], check=True
    )
    try:
        assert daemon.verdict(daemon.vif(901, bridge="vlbr0", vlan="10p/20-21")) == ""
        shown = subprocess.run(
            ["bridge", "vlan", "show", "dev", "vif901.0"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\n", 1)[1]
        vlans = [line.removeprefix("vif901.0").split() for line in shown.splitlines() if line]
        assert vlans == [["10", "PVID", "Egress", "Untagged"], ["20"], ["21"]]
    finally:
        subprocess.run(["ip", "link", "del", "vlbr0"], check=True)


def vsctl(*words: str) -> str:
    done = subprocess.run(["ovs-vsctl", *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_open_vswitch(daemon: Xendevd, openvswitch: str) -> None:
    vsctl("set", "interface", openvswitch, "mtu_request=1400")
    wait_for(lambda: daemon.link(openvswitch).mtu == 1400, "the bridge keeps its MTU")
    plain = daemon.vif(901, bridge=openvswitch)
    tagged = daemon.vif(902, bridge="ovs0.100", script="vif-xendevd-openvswitch")
    trunk = daemon.vif(903, bridge="ovs0:20:30", vifname="trunk0")
    linux = daemon.vif(904)
    nowhere = daemon.vif(905, bridge="ovs9", script="vif-xendevd-openvswitch")
    assert [daemon.verdict(path) for path in (plain, tagged, trunk, linux)] == [""] * 4
    assert "there is no bridge 'ovs9'" in daemon.verdict(nowhere)
    assert vsctl("list-ports", "ovs0").split() == ["trunk0", "vif901.0", "vif902.0"]
    assert vsctl("get", "port", "vif902.0", "tag") == "100"
    assert vsctl("get", "port", "trunk0", "trunks") == "[20, 30]"
    assert daemon.link("vif901.0").up
    assert daemon.link("vif901.0").mtu == 1400
    daemon.remove(plain)
    wait_for(lambda: "vif901.0" not in vsctl("list-ports", "ovs0"), "the port stays")
    # A port whose vif went while nobody listened goes with the next start.
    daemon.stop(signal.SIGKILL)
    daemon.remove(tagged)
    daemon.start()
    wait_for(lambda: "vif902.0" not in vsctl("list-ports", "ovs0"), "the stale port stays")
    assert vsctl("list-ports", "ovs0") == "trunk0"


XL_GUEST = """\
name = "xendevd-test"
kernel = "/src/guests/build/hello.elf"
memory = 16
vif = ["mac=00:16:3e:00:00:aa,bridge={bridge}{more}"]
"""


@pytest.mark.xenstored
def test_xl_create_with_a_vif(daemon: Xendevd, tmp_path: Path) -> None:
    conf = Path("/etc/xen/xl.conf")
    before = conf.read_text() if conf.exists() else None
    conf.write_text('vif.default.script="/usr/local/bin/vif-xendevd"\n')
    guest = tmp_path / "guest.cfg"
    try:
        guest.write_text(XL_GUEST.format(bridge="xenbr0", more=",vifname=xlweb0"))
        subprocess.run(["xl", "create", "-p", str(guest)], check=True)
        try:
            link = daemon.link("xlweb0")
            assert (link.up, link.master) == (True, daemon.link("xenbr0").ifindex)
        finally:
            subprocess.run(["xl", "destroy", "xendevd-test"], check=True)
        assert daemon.route.link("xlweb0") is None
        guest.write_text(XL_GUEST.format(bridge="nowhere0", more=""))
        failed = subprocess.run(
            ["xl", "create", "-p", str(guest)], capture_output=True, text=True, check=False
        )
        assert failed.returncode != 0
        assert "there is no bridge 'nowhere0'" in failed.stderr
    finally:
        if before is None:
            conf.unlink()
        else:
            conf.write_text(before)
