"""Ports of Open vSwitch: a real ovsdb-server, with ovs-vswitchd's part played by the test."""

import os
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from xendevd import jsonrpc, openvswitch
from xendevd.openvswitch import OpenVSwitch, add_ports, port_vlans
from xendevd.plan import VifPlan, Vlans

PREFIX = os.environ.get("OVS_PREFIX", "")  # where Debian's packages are unpacked, if not at /
SCHEMA = Path(f"{PREFIX}/usr/share/openvswitch/vswitch.ovsschema")


def tool(name: str) -> str:
    path = shutil.which(name, path=f"{PREFIX}/usr/bin:{PREFIX}/usr/sbin")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def poll_for(peer: jsonrpc.Peer, seconds: float, *, writing: bool = False) -> None:
    """Wait until the peer has something for us, or takes something."""
    poll = select.poll()
    poll.register(peer, select.POLLIN | (select.POLLOUT if writing else 0))
    poll.poll(seconds * 1000)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[str]:
    """A database with the bridges ovs0 and ovs1; the socket's path."""
    path, db = str(tmp_path / "db.sock"), str(tmp_path / "conf.db")
    subprocess.run([tool("ovsdb-tool"), "create", db, str(SCHEMA)], check=True)
    command = [tool("ovsdb-server"), "--unixctl=none", f"--remote=punix:{path}", "-vconsole:off"]
    with subprocess.Popen([*command, db]) as server:
        deadline = time.monotonic() + 20
        while not Path(path).exists():
            assert server.poll() is None
            assert time.monotonic() < deadline
            os.sched_yield()
        bridges = [
            {"op": "insert", "table": "Bridge", "row": {"name": name}, "uuid-name": name}
            for name in ("ovs0", "ovs1")
        ]
        uuids = ["set", [["named-uuid", "ovs0"], ["named-uuid", "ovs1"]]]
        root = {"op": "insert", "table": "Open_vSwitch", "row": {"bridges": uuids}}
        ask(path, *bridges, root)
        yield path
        server.terminate()


def ask(path: str, *operations: dict[str, Any]) -> list[Any]:
    """One transaction on a connection of its own."""
    switch = OpenVSwitch([path])
    replies: list[tuple[list[Any], str]] = []
    switch.transact(list(operations), lambda results, error: replies.append((results, error)))
    run(switch, lambda: bool(replies))
    results, error = replies[0]
    assert not error, error
    return results


def run(switch: OpenVSwitch, done: Any) -> None:
    """What the daemon's loop does, until ``done()``."""
    deadline = time.monotonic() + 30
    while not done():
        peer = switch.peer
        assert peer is not None
        assert time.monotonic() < deadline
        poll_for(peer, 1.0, writing=peer.blocked)
        peer.send()
        peer.receive()
        if not peer.closed:
            peer.expire()


def interfaces(path: str) -> dict[str, dict[str, Any]]:
    columns = ["name", "ofport", "external_ids"]
    rows = ask(path, {"op": "select", "table": "Interface", "where": [], "columns": columns})
    return {row["name"]: row for row in rows[0]["rows"]}


def ports(path: str) -> dict[str, dict[str, Any]]:
    columns = ["name", "tag", "trunks", "vlan_mode", "_uuid"]
    rows = ask(path, {"op": "select", "table": "Port", "where": [], "columns": columns})
    return {row["name"]: row for row in rows[0]["rows"]}


def bridge_ports(path: str, name: str) -> list[Any]:
    where = [["name", "==", name]]
    rows = ask(path, {"op": "select", "table": "Bridge", "where": where, "columns": ["ports"]})
    value = rows[0]["rows"][0]["ports"]
    return list(value[1]) if value[0] == "set" else [value]


class Vswitchd(threading.Thread):
    """Gives every new interface a port number, those whose name ends in ``bad`` an error."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            for name, row in interfaces(self.path).items():
                if row["ofport"] == ["set", []]:
                    result: dict[str, Any] = {"ofport": 7}
                    if name.endswith("bad"):
                        result = {"ofport": -1, "error": f"could not open network device {name}"}
                    where = [["name", "==", name]]
                    ask(
                        self.path,
                        {"op": "update", "table": "Interface", "where": where, "row": result},
                    )

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.join()


def plan(name: str, bridge: str = "ovs0", **more: Any) -> VifPlan:
    more.setdefault("ovs_bridge", bridge)
    return VifPlan(f"backend/vif/{name}", name, name, bridge, openvswitch=True, **more)


def plug(path: str, *plans: VifPlan) -> dict[str, str]:
    """Plug the vifs; for each "" or the error."""
    switch = OpenVSwitch([path])
    verdicts: dict[str, str] = {}
    switch.plug(
        plans, lambda plan, error: verdicts.__setitem__(plan.ifname, str(error) if error else "")
    )
    if switch.peer is not None:
        run(switch, lambda: switch.peer is None or switch.peer.deadline is None)
    return verdicts


def test_plug_and_unplug(database: str) -> None:
    plans = [
        plan("vif1.0", mac="00:16:3e:00:00:01"),
        plan("vif2.0", ovs_vlans=Vlans(9, frozenset({9}))),
        plan("vif3.0", "ovs1", ovs_vlans=Vlans(None, frozenset(), frozenset({5, 6}))),
    ]
    with Vswitchd(database):
        assert plug(database, *plans) == {"vif1.0": "", "vif2.0": "", "vif3.0": ""}
    made = ports(database)
    assert made["vif2.0"]["tag"] == 9
    assert made["vif3.0"]["trunks"] == ["set", [5, 6]]
    assert bridge_ports(database, "ovs1") == [made["vif3.0"]["_uuid"]]
    ids = dict(interfaces(database)["vif1.0"]["external_ids"][1])
    assert ids == {
        "attached-by": "xendevd",
        "attached-mac": "00:16:3e:00:00:01",
        "xenbus-path": "backend/vif/vif1.0",
    }
    switch = OpenVSwitch([database])
    known: list[str] = []
    switch.ours(known.extend)
    run(switch, lambda: known)
    assert sorted(known) == ["vif1.0", "vif2.0", "vif3.0"]
    switch.unplug(["vif1.0", "vif3.0", "vif8.0"])
    run(switch, lambda: switch.peer is not None and switch.peer.deadline is None)
    assert list(ports(database)) == ["vif2.0"]


def test_a_stale_port_of_that_name_gives_way(database: str) -> None:
    with Vswitchd(database):
        assert plug(database, plan("vif1.0")) == {"vif1.0": ""}
        assert plug(database, plan("vif1.0", "ovs1"), plan("vif2.0")) == {
            "vif1.0": "",
            "vif2.0": "",
        }
    assert bridge_ports(database, "ovs1") == [ports(database)["vif1.0"]["_uuid"]]
    assert len(bridge_ports(database, "ovs0")) == 1


def test_each_vif_has_its_own_verdict(database: str) -> None:
    twice = Vlans(1, frozenset({1, 2}))
    with Vswitchd(database):
        verdicts = plug(
            database,
            plan("vif1.0"),
            plan("vif2.0", "ovs9"),
            plan("vif3.bad"),
            plan("vif4.0", ovs_vlans=twice),
        )
    assert verdicts == {
        "vif1.0": "",
        "vif2.0": "there is no bridge 'ovs9', neither Linux nor Open vSwitch",
        "vif3.bad": "Open vSwitch: could not open network device vif3.bad",
        "vif4.0": "Open vSwitch knows one untagged VLAN for each port",
    }
    assert list(ports(database)) == ["vif1.0"]


def test_many_at_once(database: str) -> None:
    with Vswitchd(database):
        verdicts = plug(database, *(plan(f"vif{n}.0") for n in range(1, 201)))
    assert set(verdicts.values()) == {""}
    assert len(bridge_ports(database, "ovs0")) == 200


def test_without_vswitchd(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvswitch, "SWITCH_PATIENCE", 100)
    assert "is ovs-vswitchd running?" in plug(database, plan("vif1.0"))["vif1.0"]


def test_without_open_vswitch(tmp_path: Path) -> None:
    path = str(tmp_path / "none")
    assert "does not answer" in plug(path, plan("vif1.0"))["vif1.0"]
    switch = OpenVSwitch([path])
    assert not switch.available()
    switch.unplug(["vif1.0"])
    names: list[list[str]] = []
    switch.ours(names.append)
    assert names == [[]]


@pytest.mark.parametrize("reply", [b"[]", b"garbage", b'"text"', b'{"id":1,"result":5}', b""])
def test_a_server_that_talks_nonsense(tmp_path: Path, reply: bytes) -> None:
    path = str(tmp_path / "db.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        switch = OpenVSwitch([path])
        verdicts: list[Exception | None] = []
        switch.plug([plan("vif1.0")], lambda _, error: verdicts.append(error))
        served, _ = listener.accept()
        served.recv(1 << 16)
        served.sendall(reply)
        served.close()
        peer = switch.peer
        assert peer is not None
        while not verdicts:
            poll_for(peer, 1.0)
            peer.receive()
        assert isinstance(verdicts[0], Exception)


def test_echo_is_answered_and_silence_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonrpc, "PATIENCE", 0.0)
    path = str(tmp_path / "db.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        peer = jsonrpc.Peer(path)
        served, _ = listener.accept()
        outcomes: list[str] = []
        peer.call("transact", [], lambda _, error: outcomes.append(error))
        served.recv(1 << 16)
        served.sendall(b'{"method":"echo","params":["x"],"id":"echo"}')
        poll_for(peer, 5.0)
        peer.receive()
        assert served.recv(1 << 16) == b'{"id":"echo","result":["x"],"error":null}'
        peer.expire()
        assert outcomes == ["no reply within 0 s"]
        peer.close()
        served.close()


def test_native_vlan_beside_tagged_ones() -> None:
    assert port_vlans(Vlans(9, frozenset({9}), frozenset({20, 30}))) == {
        "tag": 9,
        "trunks": ["set", [20, 30]],
        "vlan_mode": "native-untagged",
    }
    assert port_vlans(None) == {}
    names = [op["op"] for op in add_ports([plan("a"), plan("b"), plan("c", "ovs1")])]
    assert names == [*["wait"] * 2, *["insert"] * 6, *["mutate"] * 2]
