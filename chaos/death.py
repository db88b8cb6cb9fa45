"""Learning of a domain's death.

The hypervisor raises VIRQ_DOM_EXC when a domain shuts down or is gone, but only
one process of Dom0 may bind it (xenstored does, where it runs). Whoever comes
second looks at the domain ten times a second instead.
"""

from __future__ import annotations

import errno
import time
from typing import TYPE_CHECKING, NamedTuple

from xenctypes.errors import CallFailed
from xenctypes.evtchn import VIRQ_DOM_EXC, Evtchn

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from chaos.host import Host
    from xenctypes.ctrl import DomainInfo

POLL_SECONDS = 0.1


class Death(NamedTuple):
    """How a domain ended: ``info`` of the dead domain, or None when it is gone altogether."""

    info: DomainInfo | None


class DeathWatch:
    """Tells when one domain died. ``fd`` is for poll(2), or -1: then poll for ``timeout``."""

    def __init__(self, host: Host, domid: int, uuid: bytes) -> None:
        self._host = host
        self._domid = domid
        self._uuid = uuid
        self._evtchn: Evtchn | None = Evtchn()
        try:
            self._evtchn.bind_virq(VIRQ_DOM_EXC)
        except CallFailed as error:
            self._evtchn.close()
            self._evtchn = None
            if error.errno != errno.EEXIST:
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._evtchn is not None:
            self._evtchn.close()

    @property
    def fd(self) -> int:
        """The descriptor that becomes readable when some domain died, or -1."""
        return -1 if self._evtchn is None else self._evtchn.fd

    @property
    def timeout(self) -> float | None:
        """How long a caller may wait before it asks ``check`` again, in seconds."""
        return POLL_SECONDS if self._evtchn is None else None

    def drain(self) -> None:
        """Take the event, after ``fd`` became readable."""
        if self._evtchn is not None:
            self._evtchn.unmask(self._evtchn.pending())

    def check(self) -> Death | None:
        """The domain's death, or None while it lives."""
        info = self._host.ctrl.domain_info(self._domid)
        if info is None or info.uuid != self._uuid:
            return Death(None)
        return Death(info) if info.shutdown or info.dying else None


def remaining(deadline: float | None, *bounds: float | None) -> float | None:
    """Seconds until ``deadline`` (monotonic), cut to the smallest of ``bounds``; None: no limit."""
    limits = [bound for bound in bounds if bound is not None]
    if deadline is not None:
        limits.append(max(0.0, deadline - time.monotonic()))
    return min(limits, default=None)
