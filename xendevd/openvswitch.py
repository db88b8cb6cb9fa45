"""Vifs as ports of an Open vSwitch bridge: what Xen's vif-openvswitch script does.

ovs-vsctl is a client of the switch's database like any other; so are we, over its
socket (RFC 7047; tables and columns: ovs-vswitchd.conf.db(5)). A port is there when
ovs-vswitchd has filled in its interface's ``ofport``: -1 if it could not open it.

::

    xendevd                                ovsdb-server       ovs-vswitchd
      | transact: port, interface, bridge    --->  commit  --->  opens vifN.M
      | transact: wait until ofport is set   --->   ...    <---  ofport
      | <--- ofport, error
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from noxs.hotplug import DeviceError
from xendevd.jsonrpc import Peer
from xendevd.plan import VifPlan, Vlans

SOCKETS = ("/run/openvswitch/db.sock", "/var/run/openvswitch/db.sock")
DATABASE = "Open_vSwitch"
OWNER = ["attached-by", "xendevd"]
"""In the external-ids of our interfaces, so that they are known again after a restart."""
SWITCH_PATIENCE = 10_000
"""How long ovs-vswitchd may take to open an interface, in milliseconds."""

Done = Callable[[VifPlan, Exception | None], None]
Operation = dict[str, Any]


class OpenVSwitch:
    """The switch. Nothing here waits: the outcome of a plug goes to its ``done``."""

    def __init__(self, sockets: Iterable[str] = SOCKETS) -> None:
        self._sockets = tuple(sockets)
        self._peer: Peer | None = None

    @property
    def peer(self) -> Peer | None:
        """The connection to poll, if there is one."""
        if self._peer is not None and self._peer.closed:
            self._peer = None
        return self._peer

    def available(self) -> bool:
        """Whether there is an Open vSwitch to ask."""
        return self._connected()

    def plug(self, plans: Sequence[VifPlan], done: Done) -> None:
        """Make ports of vifs that exist already; ``done`` is called once for each."""
        _Plug(self, list(plans), done).start()

    def unplug(self, names: Iterable[str]) -> None:
        """Remove the ports of these names, if there are any."""
        names = list(names)
        if names and self._connected():
            self.remove(names, lambda _: None)

    def ours(self, reply: Callable[[list[str]], None]) -> None:
        """Ask for the names of the ports that xendevd has made."""
        if not self._connected():
            reply([])
            return
        where = [["external_ids", "includes", ["map", [OWNER]]]]
        select = {"op": "select", "table": "Interface", "where": where, "columns": ["name"]}

        def names(results: list[Any], error: str) -> None:
            reply([] if error else [str(row["name"]) for row in results[0]["rows"]])

        self.transact([select], names)

    def transact(
        self, operations: list[Operation], reply: Callable[[list[Any], str], None]
    ) -> None:
        """Run one transaction: ``reply`` gets the results, or [] and the first error."""

        def check(result: Any, error: str) -> None:
            if error or not isinstance(result, list):
                reply([], error or "malformed reply")
                return
            for index, outcome in enumerate(result):
                if isinstance(outcome, dict) and outcome.get("error"):
                    kind = str(outcome["error"])
                    reply([index], f"{kind}: {outcome.get('details', '')}".rstrip(": "))
                    return
            reply(result, "")

        try:
            peer = self._connect()
        except OSError as error:
            reply([], f"Open vSwitch does not answer: {error.strerror}")
            return
        peer.call("transact", [DATABASE, *operations], check)

    def _connect(self) -> Peer:
        if self.peer is None:
            error: OSError | None = None
            for path in self._sockets:
                try:
                    self._peer = Peer(path)
                    break
                except OSError as failed:
                    error = error or failed
            else:
                raise error or OSError("no socket")
        assert self._peer is not None
        return self._peer

    def _connected(self) -> bool:
        try:
            self._connect()
        except OSError:
            return False
        return True

    def remove(self, names: Sequence[str], then: Callable[[str], None]) -> None:
        """Take ports out of whichever bridges have them; ``then`` gets "" or the error."""

        def found(results: list[Any], error: str) -> None:
            uuids = [row["_uuid"] for result in results if not error for row in result["rows"]]
            if error or not uuids:
                then(error)
                return
            mutation = ["ports", "delete", ["set", uuids]]
            mutate = {"op": "mutate", "table": "Bridge", "where": [], "mutations": [mutation]}
            self.transact([mutate], lambda _, failed: then(failed))

        selects = [
            {
                "op": "select",
                "table": "Port",
                "where": [["name", "==", name]],
                "columns": ["_uuid"],
            }
            for name in names
        ]
        self.transact(selects, found)


class _Plug:
    """One plug of one or many vifs on its way through the database.

    All go in one transaction. If that fails they go one by one, so that each gets its
    own verdict; one that fails because an old port has its name goes once more after
    removing that.
    """

    def __init__(
        self, switch: OpenVSwitch, plans: list[VifPlan], done: Done, *, again: bool = True
    ) -> None:
        self.switch = switch
        self.plans = plans
        self.done = done
        self.again = again

    def start(self) -> None:
        if not self.plans:
            return
        try:
            operations = add_ports(self.plans)
        except DeviceError as error:
            self._added([], str(error))
        else:
            self.switch.transact(operations, self._added)

    def _added(self, results: list[Any], error: str) -> None:
        if not error:
            waits = [wait_for_ofport(plan) for plan in self.plans]
            selects = [select_ofport(plan) for plan in self.plans]
            self.switch.transact([*waits, *selects], self._opened)
        elif len(self.plans) > 1:
            for plan in self.plans:
                _Plug(self.switch, [plan], self.done).start()
        elif error.startswith("constraint violation") and self.again:
            self.again = False
            self.switch.remove([self.plans[0].ifname], self._removed)
        elif error.startswith("timed out") and results == [0]:
            self._fail(
                f"there is no bridge {self.plans[0].bridge!r}, neither Linux nor Open vSwitch"
            )
        else:
            self._fail(error)

    def _removed(self, error: str) -> None:
        if error:
            self._fail(error)
        else:
            self.start()

    def _opened(self, results: list[Any], error: str) -> None:
        if error.startswith("timed out"):
            selects = [select_ofport(plan) for plan in self.plans]
            self.switch.transact(selects, self._judge)
        else:
            self._judge(results[len(self.plans) :], error)

    def _judge(self, results: list[Any], error: str) -> None:
        whys = [error] * len(self.plans) if error else [_refusal(result) for result in results]
        outcomes = list(zip(self.plans, whys, strict=True))
        self.switch.unplug(plan.ifname for plan, why in outcomes if why)
        for plan, why in outcomes:
            self.done(plan, DeviceError(f"Open vSwitch: {why}") if why else None)

    def _fail(self, why: str) -> None:
        for plan in self.plans:
            self.done(plan, DeviceError(why))


def add_ports(plans: Sequence[VifPlan]) -> list[Operation]:
    """The transaction that adds the vifs' ports, or fails if a bridge does not exist."""
    operations: list[Operation] = []
    ports: dict[str, list[Any]] = {}
    for index, plan in enumerate(plans):
        name = plan.ovs_bridge or plan.bridge
        if name not in ports:
            # With no time to wait, "wait" is a condition.
            operations.append(
                {
                    "op": "wait",
                    "timeout": 0,
                    "table": "Bridge",
                    "where": [["name", "==", name]],
                    "columns": ["name"],
                    "until": "==",
                    "rows": [{"name": name}],
                }
            )
        ports.setdefault(name, []).append(["named-uuid", f"port{index}"])
    for index, plan in enumerate(plans):
        ids = [OWNER, ["xenbus-path", plan.path]]
        ids += [["attached-mac", plan.mac]] if plan.mac else []
        interface = {"name": plan.ifname, "external_ids": ["map", ids]}
        port = {"name": plan.ifname, "interfaces": ["named-uuid", f"vif{index}"]}
        port |= port_vlans(plan.ovs_vlans)
        for table, row, uuid in (("Interface", interface, "vif"), ("Port", port, "port")):
            operations.append(
                {"op": "insert", "table": table, "row": row, "uuid-name": f"{uuid}{index}"}
            )
    for name, uuids in ports.items():
        operations.append(
            {
                "op": "mutate",
                "table": "Bridge",
                "where": [["name", "==", name]],
                "mutations": [["ports", "insert", ["set", uuids]]],
            }
        )
    return operations


def port_vlans(vlans: Vlans | None) -> Operation:
    """The columns of a Port: access, trunk, or native-untagged with trunks."""
    if vlans is None:
        return {}
    columns: Operation = {}
    if vlans.pvid is not None:
        columns["tag"] = vlans.pvid
    if len(vlans.untagged) > 1:
        raise DeviceError("Open vSwitch knows one untagged VLAN for each port")
    if vlans.tagged:
        trunks = sorted(vlans.tagged)
        columns["trunks"] = ["set", trunks]
        if vlans.pvid is not None:
            columns["vlan_mode"] = "native-untagged"
    return columns


def wait_for_ofport(plan: VifPlan) -> Operation:
    """Wait until ovs-vswitchd has dealt with the interface."""
    return {
        "op": "wait",
        "timeout": SWITCH_PATIENCE,
        "table": "Interface",
        "where": [["name", "==", plan.ifname]],
        "columns": ["ofport"],
        "until": "!=",
        "rows": [{"ofport": ["set", []]}],
    }


def select_ofport(plan: VifPlan) -> Operation:
    """Ask what came of the interface."""
    return {
        "op": "select",
        "table": "Interface",
        "where": [["name", "==", plan.ifname]],
        "columns": ["ofport", "error"],
    }


def _refusal(result: Any) -> str:
    """Why ovs-vswitchd could not open an interface, or ""."""
    rows = result.get("rows") or [{}]
    ofport, error = rows[0].get("ofport", -1), rows[0].get("error", ["set", []])
    if isinstance(error, str) and error:
        return error
    if not isinstance(ofport, int):
        return "it has not taken the interface; is ovs-vswitchd running?"
    return "it could not open the interface" if ofport < 0 else ""
