"""A hypervisor on paper: domains, event channels and pages as far as the toolstack's books go."""

from __future__ import annotations

import errno
import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any
from uuid import UUID

from xenctypes.errors import BusError, CallFailed
from xenctypes.public import XEN_DOMINF_dying, XEN_DOMINF_shutdown


class Xen:
    """Domains by domid; ``host`` is what the code under test takes for a Host."""

    def __init__(self, free_mib: int = 1024) -> None:
        self.domains: dict[int, SimpleNamespace] = {}
        self.free_mib = free_mib
        self.failing: dict[str, Exception] = {}
        self.calls: Counter[str] = Counter()
        self.mapped: list[int] = []
        self.masked: set[int] = set()
        self.ports: dict[int, tuple[int, int]] = {}
        self.waiting: list[int] = []
        self._domids = itertools.count(1)
        self._ports = itertools.count(100)
        self.page = bytearray(4096)
        self.host: Any = SimpleNamespace(
            ctrl=self, memory=self, evtchn=self, bus=self, virt_caps={"pv", "hvm", "hap"}
        )

    def _call(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.failing:
            raise self.failing[name]

    def of(self, uuid: str) -> SimpleNamespace | None:
        """The domain of a UUID."""
        return next((d for d in self.domains.values() if d.uuid == UUID(uuid).bytes), None)

    def create(self, uuid: str, *, mib: int = 4, **state: bool) -> int:
        """A domain, paused unless told otherwise."""
        domid = next(self._domids)
        info = {
            "domid": domid,
            "uuid": UUID(uuid).bytes,
            "paused": True,
            "dying": False,
            "shutdown": False,
            "shutdown_reason": None,
            "cpu_time": 0,
            "mib": mib,
            "max_pages": (mib << 8) + 256,
        }
        self.domains[domid] = SimpleNamespace(**{**info, **state})
        self.free_mib -= mib
        return domid

    # Xenctrl

    def domain_list(self) -> list[SimpleNamespace]:
        self._call("domain_list")
        return list(self.domains.values())

    def domain_states(self) -> list[tuple[int, int, bytes]]:
        self._call("domain_states")
        return [
            (
                each.domid,
                each.dying * XEN_DOMINF_dying | each.shutdown * XEN_DOMINF_shutdown,
                each.uuid,
            )
            for each in self.domains.values()
        ]

    def domain_info(self, domid: int) -> SimpleNamespace | None:
        return self.domains.get(domid)

    def domain_sethandle(self, domid: int, uuid: bytes) -> None:
        self._call("domain_sethandle")
        self.domains[domid].uuid = uuid

    def domain_destroy(self, domid: int) -> None:
        self._call("domain_destroy")
        self.free_mib += self.domains.pop(domid).mib

    def domain_setmaxmem(self, domid: int, kib: int) -> None:
        self.domains[domid].max_pages = kib >> 2

    def domain_pause(self, domid: int) -> None:
        self.domains[domid].paused = True

    def domain_unpause(self, domid: int) -> None:
        if not self.domains[domid].paused:
            raise CallFailed("xc_domain_unpause", errno.EINVAL)
        self.domains[domid].paused = False
        self.domains[domid].cpu_time = 1

    def physinfo(self) -> SimpleNamespace:
        self._call("physinfo")
        return SimpleNamespace(free_pages=self.free_mib << 8)

    # ForeignMemory

    def map(self, domid: int, _frames: list[int]) -> SimpleNamespace:
        self._call("map")
        self.mapped.append(domid)
        return SimpleNamespace(view=memoryview(self.page), close=lambda: self.mapped.remove(domid))

    # Evtchn

    def bind_interdomain(self, domid: int, remote: int) -> int:
        self._call("bind_interdomain")
        port = next(self._ports)
        self.ports[port] = domid, remote
        return port

    def unbind(self, port: int) -> None:
        self._call("unbind")
        del self.ports[port]
        self.masked.discard(port)

    def event(self, port: int) -> bool:
        """The other end notifies; whether anybody hears of it."""
        if port in self.masked:
            return False
        self.waiting.append(port)
        self.masked.add(port)
        return True

    def take(self, limit: int) -> list[int]:
        ports, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return ports

    def unmask(self, port: int) -> None:
        self.masked.discard(port)

    # Bus: nobody has vifs

    def get(self, path: str) -> str:
        raise BusError("no such node", path=path, errno=errno.ENOENT)

    def children(self, _path: str) -> None:
        return None
