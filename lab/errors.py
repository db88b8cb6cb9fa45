"""What can go wrong with the lab, and the status that the command exits with."""

from xenctypes.errors import ChaosError, UsageError

__all__ = ["ChannelBusy", "ChaosError", "Crash", "LabError", "TimedOut", "UsageError"]


class LabError(ChaosError):
    """The lab could not be built, started or reached.

    Exit status 125, the one that env(1) and timeout(1) use for their own failures.
    """

    exit_code = 125


class ChannelBusy(LabError):
    """All command channels of the running lab are in use."""


class Crash(LabError):
    """Xen or Dom0 died or went silent; ``serial`` is the end of the serial log."""

    def __init__(self, message: str, serial: str = "", *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.serial = serial


class TimedOut(Crash):
    """The command ran past its limit (exit status 124, as timeout(1) has it)."""

    exit_code = 124
