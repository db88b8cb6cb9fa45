"""The hypervisor's handles, opened when first used and closed together."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from noxs.bus import Bus
    from noxs.gueststores import GuestStores
    from xenctypes.ctrl import Xenctrl
    from xenctypes.evtchn import Evtchn
    from xenctypes.foreignmemory import ForeignMemory


class Host:
    """The running Xen host, as the toolstack holds it: control, event channels, guest memory."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every handle that was opened; each opens again when next used."""
        self._stack.close()
        for name in ("ctrl", "evtchn", "memory", "bus", "stores", "nr_cpus", "virt_caps"):
            self.__dict__.pop(name, None)

    @cached_property
    def ctrl(self) -> Xenctrl:
        """libxenctrl: domains and the hypervisor itself."""
        from xenctypes.ctrl import Xenctrl

        return self._stack.enter_context(Xenctrl())

    @cached_property
    def evtchn(self) -> Evtchn:
        """libxenevtchn: event channels of this process, released when it closes."""
        from xenctypes.evtchn import Evtchn

        return self._stack.enter_context(Evtchn())

    @cached_property
    def memory(self) -> ForeignMemory:
        """libxenforeignmemory: pages of guests."""
        from xenctypes.foreignmemory import ForeignMemory

        return self._stack.enter_context(ForeignMemory())

    @cached_property
    def bus(self) -> Bus:
        """The store that Dom0's backends listen to: noxsd's or xenstored's."""
        from noxs.bus import Bus

        return self._stack.enter_context(Bus.connect())

    @cached_property
    def stores(self) -> GuestStores:
        """storesd: the private stores of stock guests."""
        from noxs.gueststores import GuestStores

        return self._stack.enter_context(GuestStores.connect())

    @cached_property
    def nr_cpus(self) -> int:
        """How many physical CPUs are online."""
        return self.ctrl.physinfo().nr_cpus

    @cached_property
    def virt_caps(self) -> frozenset[str]:
        """What the hypervisor can do, as ``xl info`` names it."""
        return frozenset(self.ctrl.physinfo().virt_caps())

    @property
    def grant_version(self) -> int:
        """The highest grant table version that the hypervisor offers."""
        return 2 if "gnttab-v2" in self.virt_caps else 1
