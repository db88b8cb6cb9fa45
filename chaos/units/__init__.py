"""chaos-units: writes the systemd units of the daemons, with the paths of this installation.

The files beside this one are the templates. Where pip puts the daemons depends on how it was
called, so that units with fixed paths would be right for some hosts only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from importlib.resources import files

UNITS = ("noxsd.service", "xendevd.service", "storesd.service", "chaosd.service")
MOUNT = "proc-xen.mount"
DISTRIBUTION = ("/usr/lib/systemd/system", "/lib/systemd/system")
OTHERS = {
    "chaos.sysusers.conf": "sysusers.d/chaos.conf",
    "chaos.modules.conf": "modules-load.d/chaos.conf",
    "xendevd.rules": "udev/rules.d/99-xendevd.rules",
}
"""Other files, and where each goes beside systemd's."""
SINCE = {"RestartSteps": 254, "RestartMaxDelaySec": 254}
"""Settings that older releases of systemd would complain of, and do without."""
NEXT = """\
Next, as root:
  systemd-sysusers
  systemctl daemon-reload
  systemctl restart systemd-modules-load
  systemctl enable --now noxsd xendevd storesd chaosd
"""


def systemd_release() -> int:
    """The release of this host's systemd, 0 if it has none."""
    try:
        run = subprocess.run(["systemctl", "--version"], capture_output=True, check=False)
    except FileNotFoundError:
        return 0
    found = re.match(rb"systemd (\d+)", run.stdout)
    return int(found[1]) if found else 0


def render(name: str, bin_directory: str, release: int) -> str:
    """A unit's text, for daemons in ``bin_directory`` and a release of systemd."""
    text = (files(__name__) / name).read_text(encoding="utf-8")
    lines = text.replace("@BIN@", bin_directory).splitlines(keepends=True)
    return "".join(line for line in lines if SINCE.get(line.partition("=")[0], 0) <= release)


def outputs(etc: str, bin_directory: str, release: int) -> dict[str, str]:
    """Paths below ``etc`` and their texts. A distribution's own proc-xen.mount is left in place."""
    found = {f"{etc}/systemd/system/{name}": render(name, bin_directory, release) for name in UNITS}
    if not any(os.path.exists(f"{directory}/{MOUNT}") for directory in DISTRIBUTION):
        found[f"{etc}/systemd/system/{MOUNT}"] = render(MOUNT, bin_directory, release)
    for name, path in OTHERS.items():
        found[f"{etc}/{path}"] = render(name, bin_directory, release)
    return found


def main(argv: list[str] | None = None) -> int:
    """The command: write the files, say what to do next; its exit status."""
    parser = argparse.ArgumentParser(
        prog="chaos-units",
        description="Write the systemd units of noxsd, xendevd, storesd and chaosd, the chaos group"
        " (sysusers.d), the kernel modules that they need (modules-load.d), and what udev shall"
        " not run for vifs (udev/rules.d).",
    )
    parser.add_argument("--etc", default="/etc", metavar="DIR", help="where to (%(default)s)")
    parser.add_argument(
        "--bin",
        default=os.path.dirname(os.path.abspath(sys.argv[0])),
        metavar="DIR",
        help="where the daemons are (%(default)s)",
    )
    parser.add_argument("--remove", action="store_true", help="remove the files again")
    args = parser.parse_args(argv)
    if not os.access(f"{args.bin}/noxsd", os.X_OK) and not args.remove:
        sys.stderr.write(f"chaos-units: there is no noxsd in {args.bin} (see --bin)\n")
        return 2
    if set(args.bin) & set(" \t%\\\"'$"):
        sys.stderr.write(f"chaos-units: {args.bin}: a unit cannot hold such a path\n")
        return 2
    try:
        for path, text in outputs(args.etc, args.bin, systemd_release()).items():
            if args.remove:
                _remove(path)
            else:
                _write(path, text)
            sys.stdout.write(f"{path}\n")
    except OSError as error:
        sys.stderr.write(f"chaos-units: {error.filename}: {error.strerror}\n")
        return 1
    if not args.remove:
        sys.stdout.write(NEXT)
    return 0


def _write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    new = f"{path}.new"
    with open(new, "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
    os.rename(new, path)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return


if __name__ == "__main__":
    sys.exit(main())
