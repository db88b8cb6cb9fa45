"""What domains use: processor, memory and network, as rates between two looks at them.

Taken from the hypervisor and from sysfs alone: it works with a daemon, without one, and for
domains of other toolstacks. Names and boot times come from our records.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, NamedTuple

from chaos.domains import Domain, list_domains

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chaos.host import Host
    from chaos.registry import Registry

XEN_BACKENDS = "/sys/bus/xen-backend/devices"
UPTIME = "/proc/uptime"

Traffic = tuple[int, int]
"""Bytes that a guest (received, sent), over all its vifs."""


class Usage(NamedTuple):
    """One domain at one moment.

    ``cpu_percent`` is of one physical CPU, so that two busy vcpus make 200; it and the rates
    (bytes per second) are None at the first sight of a domain. ``rx`` and ``tx`` count bytes that
    the guest received and sent. ``ready_ms`` is from unpause to ready, ``uptime`` in seconds; None
    where that is not known.
    """

    name: str
    domid: int
    uuid: str
    state: str
    memory_mib: int
    vcpus: int
    cpu_seconds: float
    cpu_percent: float | None
    rx: int
    tx: int
    rx_rate: float | None
    tx_rate: float | None
    ready_ms: float | None
    uptime: float | None


class Look(NamedTuple):
    """All domains at one moment, by domid, as yet without rates. ``at`` is monotonic, in ns."""

    at: int
    usages: list[Usage]


def look(host: Host, names: Registry) -> Look:
    """Look at this host's domains."""
    domains = list_domains(host, names)
    at = time.monotonic_ns()
    network = traffic()
    return Look(
        at, [usage(each, network.get(each.domid, (0, 0)), _uptime(each)) for each in domains]
    )


class Sampler:
    """Looks again and again, and remembers the last look at each domain that lives."""

    def __init__(self, look: Callable[[], Look]) -> None:
        self._look = look
        self._last = Look(0, [])

    def sample(self) -> list[Usage]:
        """All domains now, by domid."""
        before, now = self._last, self._look()
        # A domid comes round again, and a restarted domain keeps its UUID.
        known = {(one.uuid, one.domid): one for one in before.usages}
        self._last = now
        return [
            one if last is None else with_rates(one, last, now.at - before.at)
            for one in now.usages
            for last in (known.get((one.uuid, one.domid)),)
        ]


def usage(domain: Domain, network: Traffic, uptime: float | None) -> Usage:
    """What a domain has used so far."""
    info, record = domain.info, domain.record
    return Usage(
        name=domain.name,
        domid=domain.domid,
        uuid=domain.uuid,
        state=domain.state,
        memory_mib=domain.memory_mib,
        vcpus=info.nr_online_vcpus,
        cpu_seconds=info.cpu_time / 1e9,
        cpu_percent=None,
        rx=network[0],
        tx=network[1],
        rx_rate=None,
        tx_rate=None,
        ready_ms=record.ready_ms if record else None,
        uptime=uptime,
    )


def with_rates(now: Usage, before: Usage, ns: int) -> Usage:
    """The same, with what it used a second between two looks ``ns`` nanoseconds apart."""
    cpu = rate(now.cpu_seconds, before.cpu_seconds, ns)
    return now._replace(
        cpu_percent=None if cpu is None else cpu * 100,
        rx_rate=rate(now.rx, before.rx, ns),
        tx_rate=rate(now.tx, before.tx, ns),
    )


def rate(now: float, before: float, ns: int) -> float | None:
    """Growth per second; None where time stood still, 0 where a counter started anew.

    A vif's counters vanish with the vif, which happens to a domain while it lives.
    """
    return max(0, now - before) * 1e9 / ns if ns > 0 else None


def traffic(devices: str = XEN_BACKENDS) -> dict[int, Traffic]:
    """What each domain's vifs carried, by domid, whatever their interfaces are called.

    What the guest sent is what its interface in Dom0 received. Read from the statistics in
    sysfs (Documentation/ABI/testing/sysfs-class-net-statistics of Linux).
    """
    found: dict[int, Traffic] = {}
    for device in _listing(devices):
        kind, _, rest = device.partition("-")
        domid = rest.partition("-")[0]
        if kind != "vif" or not domid.isdigit():
            continue
        for name in _listing(f"{devices}/{device}/net"):
            statistics = f"{devices}/{device}/net/{name}/statistics"
            with contextlib.suppress(OSError, ValueError):  # it may vanish at any moment
                received = _number(f"{statistics}/tx_bytes")
                sent = _number(f"{statistics}/rx_bytes")
                before = found.get(int(domid), (0, 0))
                found[int(domid)] = before[0] + received, before[1] + sent
    return found


def _listing(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _number(path: str) -> int:
    with open(path, "rb") as file:
        return int(file.read(32))


def _uptime(domain: Domain) -> float | None:
    if domain.domid == 0:
        with open(UPTIME, "rb") as file:
            return float(file.read().split()[0])
    if domain.record is None or not domain.record.created:
        return None
    return max(0.0, time.time() - domain.record.created)


SORT_KEYS: Mapping[str, str] = {
    "cpu": "cpu_percent",
    "domid": "domid",
    "memory": "memory_mib",
    "name": "name",
    "ready": "ready_ms",
    "rx": "rx_rate",
    "state": "state",
    "tx": "tx_rate",
    "uptime": "uptime",
}
GROWING = frozenset({"domid", "name", "state"})


def ordered(usages: Sequence[Usage], key: str, *, reverse: bool = False) -> list[Usage]:
    """Sorted by a key of SORT_KEYS: numbers of use from the top, the others from the bottom.

    What is not known comes last, whichever way.
    """
    field = SORT_KEYS[key]
    known = [usage for usage in usages if getattr(usage, field) is not None]
    unknown = [usage for usage in usages if getattr(usage, field) is None]
    known.sort(key=lambda one: getattr(one, field), reverse=(key not in GROWING) != reverse)
    return known + unknown
