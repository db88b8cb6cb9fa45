"""Networked guests through the command: they answer, and nothing of them stays behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from command import chaos, start
from daemons import end, ensure_xendevd, xendevd_pid
from pings import ping
from sampling import sampled
from waiting import POLL, wait_for

from chaos import config as configuration
from chaos import vif as vifs
from chaos.builder import Builder
from chaos.create import CREATE_STEPS, Creation
from chaos.destroy import destroy
from chaos.domains import find
from chaos.host import Host
from chaos.registry import Registry
from noxs.bus import Bus
from noxs.session import Session
from xenctypes.errors import BusError, StateError, StepError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DAYTIME = "examples/daytime.cfg"
PATIENCE = 60.0

pytestmark = pytest.mark.usefixtures("network")


def vif(last: int, *more: str) -> str:
    return "vif=['" + ",".join(("bridge=xenbr0", f"ip=10.77.0.{last}/24", *more)) + "']"


def ask(address: str) -> bytes:
    with socket.create_connection((address, 13), PATIENCE) as connection:
        connection.settimeout(PATIENCE)
        return connection.recv(4096)


def tree(bus: Bus, path: str = "/local/domain") -> set[str]:
    """Every node below ``path`` that belongs to a guest or its backends."""
    found = set()
    try:
        names = bus.directory(path)
    except BusError as error:
        if error.errno != errno.ENOENT:
            raise
        return found  # it has gone since it was listed
    for name in names:
        child = f"{path}/{name}"
        found.add(child)
        found |= tree(bus, child)
    return found


class Traces:
    """What networked guests leave on a host while they exist."""

    def __init__(self, host: Host, bus: Bus) -> None:
        self.host, self.bus = host, bus
        bus.mkdir("/local/domain/0/backend/vif")
        self.before = self.measure()

    def measure(self) -> dict[str, object]:
        # A kthread of netback is named after its interface and what it does: vif1.0-q0-guest-rx.
        threads = [
            name for name in map(_name, Path("/proc").glob("[0-9]*/comm")) if name.startswith("vif")
        ]
        return {
            "interfaces": sorted(n for n in os.listdir("/sys/class/net") if n.startswith("vif")),
            "devices": sorted(os.listdir("/sys/bus/xen-backend/devices")),
            "kthreads": sorted(threads),
            "domains": [info.domid for info in self.host.ctrl.domain_list()],
            "event channels": self.host.ctrl.count_evtchns(0),
            "nodes": tree(self.bus),
            "MACs": os.listdir("/run/chaos/macs"),
            "records": os.listdir("/run/chaos/domains"),
        }

    def gone(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while left := {
            key: value for key, value in self.measure().items() if value != self.before[key]
        }:
            assert time.monotonic() < deadline, left
            time.sleep(POLL)


def _name(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


@pytest.fixture
def traces() -> Iterator[Traces]:
    Registry().prepare()
    with Host() as host, Bus.connect() as bus:
        measured = Traces(host, bus)
        try:
            yield measured
        finally:
            chaos("destroy", "--all")
        measured.gone()


@pytest.mark.every_release
@pytest.mark.anyhost
def test_a_guest_with_a_vif_answers_and_goes(traces: Traces) -> None:
    made = json.loads(chaos("create", DAYTIME, "--json").stdout)
    assert made["profile"]["ready_ms"] > 0
    assert ping("10.77.0.2", 100) == 100
    for _ in range(100):
        assert b"-UTC" in ask("10.77.0.2")
    chaos("destroy", "daytime")
    traces.gone()


@pytest.mark.every_release
@pytest.mark.anyhost
def test_many_guests_answer_at_once(traces: Traces, thorough: bool) -> None:
    numbers = range(100, 150 if thorough else 120)
    with Host() as host, Builder() as builder:
        for last in numbers:
            config, _ = configuration.load(DAYTIME, [f'name="day-{last}"', vif(last)])
            Creation(config, host, builder, Registry()).run().close()
    addresses = [f"10.77.0.{last}" for last in numbers]
    with ThreadPoolExecutor(len(addresses)) as pool:
        assert {*pool.map(lambda address: ping(address, 5, 0.2), addresses)} == {5}
    for address in addresses:
        assert b"-UTC" in ask(address)


@pytest.mark.parametrize("victim", sampled([step.name for step in CREATE_STEPS]))
def test_a_failure_at_any_step_leaves_no_trace(traces: Traces, victim: str) -> None:
    def fail(do: Callable[[Creation], None]) -> Callable[[Creation], None]:
        def step(creation: Creation) -> None:
            do(creation)
            raise StateError("made to fail")

        return step

    steps = [
        step._replace(do=fail(step.do)) if step.name == victim else step for step in CREATE_STEPS
    ]
    config, _ = configuration.load(DAYTIME)
    with Host() as host, Builder() as builder:
        with pytest.raises(StepError, match="made to fail") as caught:
            Creation(config, host, builder, Registry()).run(steps)
        assert not getattr(caught.value, "__notes__", None)
    traces.gone()


def test_a_create_that_is_killed_is_reaped_with_its_vif(traces: Traces) -> None:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        steps = list(CREATE_STEPS)

        def hang(_: Creation) -> None:
            os.write(write, b"x")
            signal.pause()

        at = [step.name for step in steps].index("load image")
        steps[at] = steps[at]._replace(do=hang)
        config, _ = configuration.load(DAYTIME)
        with Host() as host, Builder() as builder:
            Creation(config, host, builder, Registry()).run(steps)
        os._exit(1)
    assert os.read(read, 1) == b"x"
    os.close(read)
    os.close(write)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert "daytime" not in chaos("list").stdout
    traces.gone()


@pytest.mark.parametrize(
    ("vifs", "said"),
    [
        ("vif=['bridge=nowhere']", 'there is no bridge "nowhere"'),
        ("vif=['bridge=xenbr0,mac=00:16:3e:77']", "is no MAC address"),
        ("vif=['bridge=xenbr0,mac=01:16:3e:00:00:01']", "is no address of one interface"),
        ("vif=['bridge=xenbr0,ip=10.77.0.300/24']", "10.77.0.300"),
        ("vif=['bridge=xenbr0,vifname=xenbr0']", 'an interface "xenbr0" exists already'),
        ("vif=['bridge=xenbr0,script=vif-nat']", "xendevd runs no scripts"),
        ("vif=['bridge=lo']", "bridge"),
        ("vif=['bridge=xenbr0,mtu=9']", "mtu"),
    ],
)
def test_what_cannot_work_is_one_line(traces: Traces, vifs: str, said: str) -> None:
    failed = chaos("create", DAYTIME, vifs, check=False)
    assert failed.returncode in {1, 2}
    assert said in failed.stderr
    first, *rest = failed.stderr.splitlines()
    assert first.startswith("chaos: ")
    assert not rest or failed.returncode == 2  # a configuration's line and its caret follow
    traces.gone()


@pytest.mark.anyhost
def test_a_failure_of_xendevd_reaches_the_create(traces: Traces) -> None:
    """The bridge filters no VLANs: only xendevd finds that out."""
    failed = chaos("create", DAYTIME, vif(2, "vlan=10"), check=False)
    assert failed.returncode == 1
    assert "vlan_filtering" in failed.stderr
    assert failed.stderr.count("\n") == 1
    traces.gone()


def test_a_mac_is_given_once(traces: Traces) -> None:
    chaos("create", "-q", DAYTIME)
    failed = chaos("create", DAYTIME, 'name="other"', check=False)
    assert failed.returncode == 1
    assert 'the MAC address 00:16:3e:77:00:02 is in use by "daytime"' in failed.stderr
    chaos("create", "-q", DAYTIME, 'name="other"', vif(3))
    macs = os.listdir("/run/chaos/macs")
    assert len(macs) == 2
    assert all(mac.startswith("00:16:3e:") for mac in macs)


def test_settings_reach_the_interface(traces: Traces) -> None:
    chaos("create", "-q", DAYTIME, vif(4, "vifname=uplink", "mtu=1400", "rate=10Mb/s"))
    link = json.loads(
        subprocess.run(
            ["ip", "-j", "link", "show", "uplink"], capture_output=True, text=True, check=True
        ).stdout
    )[0]
    assert link["mtu"] == 1400
    assert link["master"] == "xenbr0"
    domid = chaos("domid", "daytime").stdout.strip()
    assert traces.bus.read(f"/local/domain/0/backend/vif/{domid}/0/rate") == "62500,50000"
    assert ping("10.77.0.4", 3) == 3


@pytest.mark.anyhost
def test_a_zombie_is_shown(traces: Traces) -> None:
    """A domain whose memory somebody maps cannot go: it is listed as dying until they let go."""
    made = json.loads(chaos("create", "--json", DAYTIME).stdout)
    record = Registry().read(made["uuid"])
    assert record is not None
    with Host() as other:
        mapping = other.memory.map(record.domid, [record.console_frame])
        chaos("destroy", "daytime")
        lines = [line for line in chaos("list").stdout.splitlines() if f" {record.domid} " in line]
        assert len(lines) == 1
        assert lines[0].split()[-2][5] == "d"
        again = chaos("destroy", str(record.domid), check=False)
        assert again.returncode == 1
        assert "dying already" in again.stderr
        mapping.close()
    traces.gone()


def test_no_packet_is_lost_when_the_bus_is_killed(traces: Traces, restart_noxsd: Any) -> None:
    chaos("create", "-q", DAYTIME)
    assert ping("10.77.0.2", 1) == 1
    with ThreadPoolExecutor(1) as pool:
        answered = pool.submit(ping, "10.77.0.2", 200)
        restart_noxsd()
        assert answered.result(PATIENCE) == 200
    chaos("create", "-q", DAYTIME, 'name="second"', vif(3))
    assert ping("10.77.0.3", 10) == 10


@pytest.mark.anyhost
def test_without_xendevd_it_says_so(traces: Traces, no_xendevd: Any) -> None:
    failed = chaos("create", DAYTIME, check=False)
    assert failed.returncode == 1
    assert "xendevd is not running" in failed.stderr
    assert failed.stderr.count("\n") == 1
    traces.gone()


def test_without_netback_it_says_so(traces: Traces) -> None:
    subprocess.run(["modprobe", "-r", "xen-netback"], check=True)
    try:
        failed = chaos("create", DAYTIME, check=False)
        assert failed.returncode == 1
        assert "netback is not loaded" in failed.stderr
    finally:
        subprocess.run(["modprobe", "xen-netback"], check=True)
    traces.gone()


@pytest.mark.anyhost
def test_one_vifname_many_times(traces: Traces, thorough: bool) -> None:
    config, _ = configuration.load(DAYTIME, [vif(2, "vifname=uplink")])
    names = Registry()
    with Host() as host, Builder() as builder:
        for _ in range(20 if thorough else 8):
            Creation(config, host, builder, names).run().close()
            assert Path("/sys/class/net/uplink/brport").exists()
            destroy(host, names, find(host, names, "daytime"))
            assert not Path("/sys/class/net/uplink").exists()
    traces.gone()


def command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return done.stdout


def test_guests_on_open_vswitch(traces: Traces, openvswitch: str) -> None:
    """One beside Dom0's own port, two in VLAN 20, where Dom0 has a port too."""
    access = ["lan20", "tag=20", "--", "set", "interface", "lan20", "type=internal"]
    command("ovs-vsctl", "add-port", openvswitch, *access)
    for device, address in ((openvswitch, "10.78.0.1/24"), ("lan20", "10.79.0.1/24")):
        command("ip", "addr", "add", address, "dev", device)
        command("ip", "link", "set", device, "up")
    guests = {
        "plain": "bridge=ovs0,ip=10.78.0.2/24",
        "tagged": "bridge=ovs0.20,ip=10.79.0.2/24",
        "scripted": "script=vif-openvswitch,bridge=ovs0.20:30:40,ip=10.79.0.3/24",
    }
    with Host() as host, Builder() as builder:
        for name, text in guests.items():
            config, _ = configuration.load(DAYTIME, [f'name="{name}"', f"vif=['{text}']"])
            Creation(config, host, builder, Registry()).run().close()
    for address in ("10.78.0.2", "10.79.0.2", "10.79.0.3"):
        assert ping(address, 5) == 5, address
    domid = chaos("domid", "scripted").stdout.strip()
    port = f"vif{domid}.0"
    columns = [command("ovs-vsctl", "get", "port", port, c) for c in ("tag", "trunks", "vlan_mode")]
    assert columns == ["20\n", "[30, 40]\n", "native-untagged\n"]
    failed = chaos("create", DAYTIME, 'name="x"', "vif=['bridge=ovs9:20']", check=False)
    assert "there is no bridge 'ovs9:20'" in failed.stderr
    assert failed.stderr.count("\n") == 1
    chaos("destroy", "--all")
    wait_for(
        lambda: command("ovs-vsctl", "list-ports", openvswitch) == "lan20\n", "ports stay behind"
    )
    traces.gone()


def test_without_open_vswitch_it_says_so(traces: Traces) -> None:
    failed = chaos("create", DAYTIME, "vif=['bridge=ovs0:20']", check=False)
    assert failed.returncode == 1
    assert 'there is no Open vSwitch for bridge "ovs0:20"' in failed.stderr
    assert failed.stderr.count("\n") == 1
    traces.gone()


@pytest.mark.anyhost
@pytest.mark.parametrize("comes_back", [True, False])
def test_xendevd_is_killed_while_a_create_waits(traces: Traces, comes_back: bool) -> None:
    before = set(os.listdir("/sys/class/net"))
    xendevd = xendevd_pid()
    os.kill(xendevd, signal.SIGSTOP)
    code = "" if comes_back else "from chaos import vif\nvif.RESTART_TIMEOUT = 1.0"
    create = start("create", "-q", DAYTIME, code=code, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: set(os.listdir("/sys/class/net")) - before, "there is no vif")
        end(xendevd, signal.SIGKILL)
        if comes_back:
            ensure_xendevd()
        said = create.communicate(timeout=PATIENCE)[1]
    finally:
        ensure_xendevd()
    if comes_back:
        assert (create.returncode, said) == (0, "")
        assert ping("10.77.0.2", 3) == 3
    else:
        assert create.returncode == 1
        assert "vif 0: xendevd ended before it was plugged (start it" in said
        assert said.count("\n") == 1
        traces.gone()


class Interruption:
    """Has something done at one boundary between requests to the bus: the ``at``-th, from 0.

    Before an even one is sent, and between the sending of an odd one and its reply.
    """

    def __init__(self, patch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
        self.act = act
        self.count = 0
        self.at = -1
        send = Session._send

        def interrupted(session: Session, data: bytes) -> None:
            due, self.count = self.count == self.at, self.count + 1
            if due and not self.at % 2:
                self.act()
            send(session, data)
            if due and self.at % 2:
                self.act()

        patch.setattr(Session, "_send", interrupted)

    def during(self, at: int, function: Callable[[], Any]) -> Any:
        """Call the function; its value. ``count`` then says how many boundaries there were."""
        self.count, self.at = 0, at
        value = function()
        self.at = -1
        return value


STRIDE = 11  # odd, so that both ends of a request have their turn


def test_a_kill_of_the_bus_between_requests(
    traces: Traces,
    restart_noxsd: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    thorough: bool,
) -> None:
    """Vifs of an empty shell are connected and disconnected; noxsd is killed once in each."""
    first = [step.name for step in CREATE_STEPS].index("announce vifs")
    config, _ = configuration.load(DAYTIME)
    interruption = Interruption(monkeypatch, restart_noxsd)
    with Host() as host, Builder() as builder:
        creation = Creation(config, host, builder, Registry()).run(CREATE_STEPS[:first])
        bus, domid, prepared = host.bus, creation.domid, creation.vifs
        try:
            at, boundaries = 0, 1
            while at < boundaries:  # a round that kills nothing is the last
                vifs.seed(host, domid, prepared)
                connected = interruption.during(
                    at,
                    lambda: (
                        vifs.announce(bus, domid, "daytime", prepared),
                        vifs.connect(bus, domid, prepared),
                    )[1],
                )
                boundaries = interruption.count
                assert [made.mtu for made in connected] == [1500]
                assert Path(f"/sys/class/net/vif{domid}.0/brport").exists()
                interruption.during(at, lambda: vifs.disconnect_all(bus, domid))
                boundaries = max(boundaries, interruption.count)
                assert not Path(f"/sys/class/net/vif{domid}.0").exists()
                assert not bus.exists(f"/local/domain/{domid}")
                at += 1 if thorough else STRIDE
        finally:
            assert creation.undo() == []
            creation.close()
    traces.gone()


@pytest.mark.xenstored
def test_xl_knows_the_names(traces: Traces) -> None:
    for name, file in (("daytime", DAYTIME), ("hello", "examples/hello.cfg")):
        chaos("create", "-q", file)
        domid = chaos("domid", name).stdout.strip()
        rows = [line.split()[:2] for line in command("xl", "list").splitlines()]
        assert [name, domid] in rows
        assert command("xl", "domid", name).strip() == domid
    chaos("rename", "hello", "hello-again")
    assert command("xl", "domid", "hello-again").strip() == domid
    for name in ("daytime", "hello-again"):
        chaos("destroy", name)
    assert "(null)" not in command("xl", "list")
    traces.gone()
