"""vif-xendevd: the script for xl's vifs whose work xendevd does.

libxl runs the script of every vif (``run_hotplug_scripts=0`` in xl.conf has had no effect
on Linux since udev's rules went, Xen commit 2ba368d13893), waits for it, and reports what the
backend's hotplug-error says if it fails. So this one only waits for xendevd's verdict. With
``vif.default.script="/usr/local/bin/vif-xendevd"`` in xl.conf, all vifs are plugged so.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # importing typing would take a tenth of the script's time
if TYPE_CHECKING:
    from noxs.bus import Bus

VIF_BRIDGE = "/etc/xen/scripts/vif-bridge"
PATIENCE = 30.0  # seconds; libxl gives a script 40


def online(bus: Bus, path: str) -> str:
    """Wait for the verdict on the vif at ``path``: "" or what went wrong, which is written too."""
    from noxs import hotplug
    from noxs.hotplug import BusError

    status = f"{path}/{hotplug.STATUS}"
    if not hotplug.running() and bus.get(status) != hotplug.CONNECTED:
        error = "xendevd is not running (systemctl start xendevd)"
        bus.write(f"{path}/{hotplug.ERROR_TEXT}", error)
        return error
    try:
        verdict = bus.wait_for(
            status, lambda value: value in {hotplug.CONNECTED, hotplug.ERROR}, PATIENCE
        )
    except BusError as failure:
        bus.write(f"{path}/{hotplug.ERROR_TEXT}", f"xendevd: {failure}")
        return str(failure)
    if verdict == hotplug.CONNECTED:
        return ""
    return bus.get(f"{path}/{hotplug.ERROR_TEXT}") or "xendevd could not plug the vif"


def main() -> None:
    """The command: ``vif-xendevd online|offline|add|remove type_if=vif|tap``."""
    if "type_if=tap" in sys.argv:
        # The emulated twin of an HVM guest's vif is qemu's, and vif-bridge's, business.
        os.execv(VIF_BRIDGE, [VIF_BRIDGE, *sys.argv[1:]])  # noqa: S606 - no shell is the point
    path = os.environ.get("XENBUS_PATH", "")
    if "online" not in sys.argv[1:2] or not path:
        sys.exit(0 if path else "vif-xendevd: XENBUS_PATH is not set: libxl runs this")
    from noxs.bus import Bus
    from noxs.hotplug import BusError

    try:
        with Bus.connect() as bus:
            error = online(bus, path)
    except BusError as failure:
        error = str(failure)
    sys.exit(f"vif-xendevd: {path}: {error}" if error else 0)


if __name__ == "__main__":
    main()
