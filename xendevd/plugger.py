"""From events to verdicts: reads what is wanted of each vif, has it done, says how it went.

::

    events --> newest per vif --> nodes, one round trip --> VifPlan
                                                             |
                    Linux bridge (at once) <-----------------+---> Open vSwitch (later)
                             |                                          |
                             +------> hotplug-status, one transaction <-+
"""

from collections.abc import Iterable, Mapping
from typing import Protocol

from noxs.bus import Bus
from noxs.hotplug import CONNECTED, ERROR, ERROR_TEXT, STATUS, DeviceError
from xendevd import bridge
from xendevd.bridge import Gone
from xendevd.monitor import ONLINE, VifEvent
from xendevd.netlink import Link, Rtnetlink
from xendevd.openvswitch import OpenVSwitch
from xendevd.plan import KEYS, VifPlan, error_text, parse, served

AT_ONCE = 32
"""Vifs of one transaction: their nodes stay below xenstored's quota for one."""

Verdict = tuple[VifPlan | str, Exception | None, int]
"""The plan (or, without one, the path), what went wrong, the MTU or 0."""


class Log(Protocol):
    """Takes a line for the administrator; ``level`` as in syslog(3)."""

    def __call__(self, text: str, *, level: int = 6) -> None:
        """Write the line."""


class Plugger:
    """Plugs and unplugs vifs. Whatever fails for one vif is that vif's verdict."""

    def __init__(self, bus: Bus, route: Rtnetlink, switch: OpenVSwitch, log: Log) -> None:
        self.bus = bus
        self.route = route
        self.switch = switch
        self.log = log
        self.plugged = 0
        self.failed = 0
        self._names: dict[str, str] = {}  # of the switch's ports, by path
        self._verdicts: list[Verdict] = []

    @property
    def alone(self) -> bool:
        """Whether no libxl serves this host: its store is not xenstored."""
        return "/xenstored/" not in self.bus.path

    def handle(self, events: Iterable[VifEvent]) -> None:
        """Bring the vifs to where their newest events say. Raises BusError if the bus is lost."""
        newest = {event.path: event for event in events}
        offline = [event for event in newest.values() if event.action != ONLINE]
        self.switch.unplug(
            name for event in offline if (name := self._names.pop(event.path, "")) != ""
        )
        online = [event for event in newest.values() if event.action == ONLINE]
        for at in range(0, len(online), AT_ONCE):
            self._plug(online[at : at + AT_ONCE])

    def reconcile(self) -> None:
        """Remove what a predecessor left in Open vSwitch for vifs that are gone."""

        def found(names: list[str]) -> None:
            self.switch.unplug([name for name in names if self.route.link(name) is None])

        self.switch.ours(found)

    def pending(self, events: Iterable[VifEvent]) -> list[VifEvent]:
        """Those of the vifs that nobody has plugged yet."""
        events = list(events)
        found = []
        for at in range(0, len(events), AT_ONCE):
            part = events[at : at + AT_ONCE]
            states = self.bus.read_many(f"{event.path}/{STATUS}" for event in part)
            found += [e for e, state in zip(part, states, strict=True) if state != CONNECTED]
        return found

    def _plug(self, events: list[VifEvent]) -> None:
        bridges: dict[str, Link | None] = {}
        switched: list[VifPlan] = []
        for event, nodes in zip(events, self._nodes(events), strict=True):
            if not nodes or not served(nodes.get("script", ""), alone=self.alone):
                continue
            try:
                plan = parse(event.path, event.vif, nodes)
                if plan.bridge not in bridges:
                    bridges[plan.bridge] = self._bridge(plan.bridge)
                link = bridges[plan.bridge]
                if link is not None and not plan.openvswitch:
                    mtu = bridge.plug(self.route, plan, link)
                    self._verdicts.append((plan, None, mtu))
                else:
                    self._prepare(plan)
                    switched.append(plan)
            except Gone:
                continue
            except (DeviceError, OSError) as error:
                self._verdicts.append((event.path, error, 0))
        self.report()
        self.switch.plug(switched, self._switched)

    def _nodes(self, events: list[VifEvent]) -> list[Mapping[str, str]]:
        """The backend nodes of each vif; none if the backend is gone."""
        values = self.bus.read_many(f"{event.path}/{key}" for event in events for key in KEYS)
        rows = [values[at : at + len(KEYS)] for at in range(0, len(values), len(KEYS))]
        return [
            {key: value for key, value in zip(KEYS, row, strict=True) if value is not None}
            for row in rows
        ]

    def _bridge(self, name: str) -> Link | None:
        link = self.route.link(name) if len(name) < 16 else None
        return link if link is not None and link.kind == "bridge" else None

    def _prepare(self, plan: VifPlan) -> None:
        """What a vif needs before Open vSwitch takes it. Raises DeviceError, Gone."""
        if plan.openvswitch is False or not (plan.openvswitch or self._has_switch(plan)):
            raise DeviceError(
                f"there is no bridge {plan.bridge!r}",
                hint=f"ip link add {plan.bridge} type bridge",
            )
        link = bridge.find_vif(self.route, plan)
        name = plan.ifname if link.name != plan.ifname else ""
        bridge.configure(self.route, link, name=name, mtu=plan.mtu or self._mtu(plan))
        self.route.set_up(link.ifindex)
        self._names[plan.path] = plan.ifname

    def _has_switch(self, plan: VifPlan) -> bool:
        return bool(plan.ovs_bridge) and self.switch.available()

    def _mtu(self, plan: VifPlan) -> int:
        """That of the interface which an Open vSwitch bridge has in Dom0; 0 if it has none."""
        local = self.route.link(plan.ovs_bridge) if len(plan.ovs_bridge) < 16 else None
        return 0 if local is None else local.mtu

    def _switched(self, plan: VifPlan, error: Exception | None) -> None:
        link = self.route.link(plan.ifname) if error is None else None
        self._verdicts.append((plan, error, 0 if link is None else link.mtu))

    def report(self) -> None:
        """Write the verdicts that are due to where the toolstacks wait for them."""
        verdicts, self._verdicts = self._verdicts, []
        for subject, error, _ in verdicts:
            if error is None:
                self.plugged += 1
            else:
                self.failed += 1
                path = subject if isinstance(subject, str) else subject.path
                self.log(f"{path}: {error_text(error)}", level=4)
        for at in range(0, len(verdicts), AT_ONCE):
            self._write(verdicts[at : at + AT_ONCE])

    def _write(self, verdicts: list[Verdict]) -> None:
        mtu = not self.alone
        self.bus.transact(lambda nodes: write_verdicts(nodes, verdicts, mtu=mtu), repeatable=True)


class Store(Protocol):
    """What of noxs.nodes.Nodes is used."""

    def read_many(self, paths: Iterable[str]) -> list[str | None]:
        """Values, None where there is no node."""

    def write_many(self, pairs: Iterable[tuple[str, str | int]]) -> None:
        """Set values, in this order."""


def write_verdicts(nodes: Store, verdicts: list[Verdict], *, mtu: bool) -> None:
    """Write each verdict whose backend still exists.

    A write creates what it needs: without looking first, the verdict on a vif that was
    destroyed meanwhile would bring its nodes back. ``mtu`` also tells the guest the MTU,
    as vif-bridge does.
    """
    paths = [subject if isinstance(subject, str) else subject.path for subject, _, _ in verdicts]
    alive = nodes.read_many(f"{path}/frontend-id" for path in paths)
    pairs: list[tuple[str, str | int]] = []
    for (subject, error, size), path, exists in zip(verdicts, paths, alive, strict=True):
        if exists is None:
            continue
        if error is not None:
            pairs += [(f"{path}/{ERROR_TEXT}", error_text(error)), (f"{path}/{STATUS}", ERROR)]
            continue
        if mtu and size and not isinstance(subject, str) and subject.frontend:
            pairs.append((f"{subject.frontend}/mtu", size))
        pairs.append((f"{path}/{STATUS}", CONNECTED))
    nodes.write_many(pairs)
