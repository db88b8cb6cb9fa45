"""libxendevicemodel and libxentoolcore: acting on one domain, with less power."""

from __future__ import annotations

from xenctypes.handle import Handle
from xenctypes.loader import load, open_handle


class DeviceModel(Handle):
    """A handle for device model operations (xendevicemodel.h)."""

    def __init__(self) -> None:
        self._lib = load("xendevicemodel")
        super().__init__(
            lambda log: open_handle(self._lib.xendevicemodel_open, log.logger, 0),
            self._lib.xendevicemodel_close,
        )

    def restrict(self, domid: int) -> None:
        """From now on this handle can act on ``domid`` only."""
        self._lib.xendevicemodel_restrict(self.raw, domid)

    def shutdown(self, domid: int, reason: int) -> None:
        """Shut an HVM or PVH domain down, with a SHUTDOWN_* reason."""
        self._lib.xendevicemodel_shutdown(self.raw, domid, reason)


def restrict_all(domid: int) -> None:
    """Restrict every open handle of this process to one domain (xentoolcore.h).

    Handles of libraries that were loaded but cannot be restricted become useless.
    """
    load("xentoolcore").xentoolcore_restrict_all(domid)
