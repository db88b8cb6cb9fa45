"""Installs the project's wheel in Dom0, as pip would: entry points, RECORD, bytecode.

Under emulation compiling is what takes the time, so a file whose content is unchanged
since the wheel before keeps its bytecode.
"""

import contextlib
import csv
import os
import py_compile
import subprocess
import sys
import sysconfig
from pathlib import Path

from installer import install
from installer.destinations import SchemeDictionaryDestination
from installer.sources import WheelFile

NAME = "chaos_xen"
DAEMONS = ("noxsd", "xendevd", "storesd", "chaosd")


def installed(library: Path) -> dict[Path, str]:
    """Files of the installed version and their recorded hashes ("" where there is none)."""
    for record in library.glob(f"{NAME}-*.dist-info/RECORD"):
        with record.open(newline="") as rows:
            return {
                Path(os.path.normpath(library / row[0])): row[1] for row in csv.reader(rows) if row
            }
    return {}


def main() -> None:
    """Install the wheel that the command line names over whatever version is there."""
    schemes = dict(sysconfig.get_paths())
    schemes["headers"] = str(Path(schemes["data"]) / "include" / NAME)
    library = Path(schemes["purelib"])
    before = installed(library)
    for path in before:
        path.unlink(missing_ok=True)
    destination = SchemeDictionaryDestination(
        schemes, interpreter="/usr/bin/python3", script_kind="posix"
    )
    with WheelFile.open(sys.argv[1]) as source:
        install(source, destination, additional_metadata={"INSTALLER": b"lab\n"})
    after = installed(library)
    sources = [path for path in after if path.suffix == ".py"]
    _compile([path for path in sources if before.get(path) != after[path]])
    for path in sources:
        if before.get(path) == after[path]:
            _refresh(path)
    for path in before.keys() - after.keys():
        for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            stale.unlink()
        with contextlib.suppress(OSError):
            path.parent.rmdir()
    scripts = Path(schemes["scripts"])
    # udevd sees by itself that there is another rule; what else is written is for systemd.
    subprocess.run([str(scripts / "chaos-units")], stdout=subprocess.DEVNULL, check=True)
    if Path("/run/systemd/system").is_dir():
        _start_units(scripts)


def _compile(sources: list[Path]) -> None:
    """Half of them in a child: there are two processors."""
    child = os.fork()
    if not child:
        status = 1
        try:
            for path in sources[::2]:
                py_compile.compile(str(path), doraise=True)
            status = 0
        except py_compile.PyCompileError as error:
            print(error, file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    for path in sources[1::2]:
        py_compile.compile(str(path), doraise=True)
    if os.waitpid(child, 0)[1]:
        sys.exit("the wheel's sources do not compile (above)")


def _start_units(scripts: Path) -> None:
    """Have the daemons run what was just installed."""
    found = [name for name in DAEMONS if (scripts / name).exists()]
    for command in (
        ["systemd-sysusers"],
        ["systemctl", "daemon-reload"],
        ["systemctl", "enable", "-q", *found],
    ):
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    done = subprocess.run(["systemctl", "restart", *found], check=False)
    if done.returncode:  # not the end: whoever works on another part still gets a lab
        subprocess.run(["systemctl", "status", "--no-pager", "-n30", *found], check=False)


def _refresh(path: Path) -> None:
    """Give an unchanged source the time that its bytecode was compiled for (PEP 552)."""
    import importlib.util

    cached = Path(importlib.util.cache_from_source(str(path)))
    try:
        with cached.open("rb") as file:
            stamp = int.from_bytes(file.read(16)[8:12], "little")
    except OSError:
        py_compile.compile(str(path), doraise=True)
    else:
        os.utime(path, (stamp, stamp))


if __name__ == "__main__":
    main()
