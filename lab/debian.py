"""The host's Debian side: package mirrors, apt options and missing commands."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from lab import cache
from lab.errors import LabError
from lab.release import Release

DEFAULT_ARCHIVE = "http://deb.debian.org/debian"
DEFAULT_SECURITY = "http://deb.debian.org/debian-security"

COMMANDS = {
    "qemu-system-x86_64": ("qemu-system-x86",),
    "mmdebstrap": ("mmdebstrap",),
    "mke2fs": ("e2fsprogs",),
    "setpriv": ("util-linux",),
    "newuidmap": ("uidmap",),
    "gcc": ("gcc", "libc6-dev"),
    "make": ("make",),
}
"""Commands that the lab calls, and the packages that bring them."""

HEADERS = {"/usr/include/xen/xen.h": ("libxen-dev",)}
"""Headers that the guests are compiled with."""

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def ensure(commands: Iterable[str] = (), headers: Iterable[str] = ()) -> None:
    """Install what is missing through apt; raise LabError with the apt line if that fails."""
    commands, headers = list(commands), list(headers)
    if any(_lacking(commands, headers)):
        with cache.locked("apt.lock"):
            _install(*_lacking(commands, headers))


def _lacking(commands: list[str], headers: list[str]) -> tuple[list[str], list[str]]:
    missing = [c for c in commands if not shutil.which(c, path=PATH)]
    return missing, [h for h in headers if not Path(h).exists()]


def _install(missing: list[str], absent: list[str]) -> None:
    if not missing and not absent:
        return  # another process was faster
    packages = sorted(
        {p for c in missing for p in COMMANDS[c]} | {p for h in absent for p in HEADERS[h]}
    )
    what = ", ".join(missing + absent)
    install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
    prefix = [] if os.geteuid() == 0 else ["sudo"]
    hint = f"as root: apt-get update && {' '.join(install)}"
    if not shutil.which("apt-get") or (prefix and not shutil.which("sudo")):
        raise LabError(f"not found: {what}", hint=hint)
    print(f"lab: installing {' '.join(packages)} (for {what})", file=sys.stderr, flush=True)
    # Fresh lists first: those of an old machine name versions that mirrors no longer hold.
    for command in (["apt-get", "update"], install):
        done = subprocess.run(
            [*prefix, *command],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        sys.stderr.write(done.stdout[-2000:])
        raise LabError(f"apt-get could not install what brings {what}", hint=hint)


def mirrors() -> tuple[str, str]:
    """URIs of the archive and of its security companion, as the host's apt has them."""
    targets = _targets()
    archive = next((uri for uri, suite in targets if suite.endswith("-updates")), None)
    security = next((uri for uri, suite in targets if suite.endswith("-security")), None)
    return archive or DEFAULT_ARCHIVE, security or DEFAULT_SECURITY


def _targets() -> list[tuple[str, str]]:
    """The (URI, suite) of each package index in apt's sources, fetched or not.

    What Debian's own archive is shows in its suites: nobody else has a -updates and
    a -security companion.
    """
    try:
        text = subprocess.run(
            [
                *("apt-get", "indextargets", "--no-release-info"),
                *("--format", "$(REPO_URI)\t$(RELEASE)"),
                "Created-By: Packages",
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    rows = [line.split("\t") for line in text.splitlines()]
    return [
        (row[0].rstrip("/"), row[1])
        for row in rows
        if len(row) == 2 and row[0].startswith(("http://", "https://"))
    ]


def sources(release: Release) -> list[str]:
    """One-line apt sources of ``release`` on the host's mirrors."""
    archive, security = mirrors()
    return [
        f"deb {archive} {release.suite} main",
        f"deb {archive} {release.suite}-updates main",
        f"deb {security} {release.suite}-security main",
    ]


def apt_options() -> list[str]:
    """The host's Acquire settings on proxies, TLS and validity, as lines of apt.conf."""
    try:
        text = subprocess.run(
            ["apt-config", "dump", "--no-empty"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    wanted = (
        "acquire::http::",
        "acquire::https::",
        "acquire::check-valid-until",
        "acquire::check-date",
        "acquire::retries",
    )
    return [line for line in text.splitlines() if line.lower().startswith(wanted)]
