"""What the lab takes from the working tree: the project's wheel and the guests."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from lab import cache, debian
from lab.errors import LabError
from lab.progress import say

NOT_IN_WHEEL = {
    "bench",
    "build",
    "dist",
    "docs",
    "examples",
    "guests",
    "lab",
    "lab-out",
    "scripts",
    "tests",
}
"""Folders at the top of the tree whose files never get into the wheel."""

KEPT_WHEELS = 8


def digest(tree: Path) -> str:
    """Hash of all sources that the wheel is built from: paths, modes and contents."""
    sums = hashlib.sha256()
    for folder, folders, files in os.walk(tree):
        skip = NOT_IN_WHEEL if Path(folder) == tree else {"__pycache__"}
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if name.startswith(".") or name.endswith((".pyc", ".swp", "~")):
                continue
            try:
                data = path.read_bytes()
                mode = path.stat().st_mode
            except FileNotFoundError:
                continue
            line = f"{path.relative_to(tree)}\0{mode:o}\0{len(data)}\0"
            sums.update(line.encode() + data)
    return sums.hexdigest()[:16]


def wheels() -> Path:
    """The folder of built wheels; Dom0 sees it as /wheels."""
    path = cache.directory() / "wheels"
    path.mkdir(exist_ok=True)
    return path


def wheel() -> str:
    """Build the wheel unless the same sources were built before; return its path in /wheels."""
    with cache.locked("wheels.build"):
        name = digest(cache.TREE)
        home = wheels() / name
        if not home.is_dir():
            work = Path(tempfile.mkdtemp(prefix=".", dir=wheels()))
            try:
                _hatch(work)
                work.chmod(0o755)
                work.rename(home)
            finally:
                shutil.rmtree(work, ignore_errors=True)
            kept = sorted(wheels().iterdir(), key=lambda p: p.stat().st_mtime)
            for old in kept[:-KEPT_WHEELS]:
                shutil.rmtree(old)
        return f"{name}/{next(home.glob('*.whl')).name}"


def _hatch(target: Path) -> None:
    debian.ensure(["gcc"])
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)],
        cwd=cache.TREE,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode or not list(target.glob("*.whl")):
        raise LabError(f"the wheel does not build:\n{done.stdout.rstrip()[-2000:]}")


def guests() -> None:
    """Compile the guests, so that Dom0 finds them in /src/guests/build."""
    if not (cache.TREE / "guests" / "Makefile").exists():
        return
    debian.ensure(["gcc", "make"], debian.HEADERS)
    with cache.locked("guests.build"):
        done = subprocess.run(
            ["make", "-s", "-C", "guests"],
            cwd=cache.TREE,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode:
        # Not the end: whoever works on something else still gets a lab.
        sys.stderr.write(done.stdout[-2000:])
        say("the guests do not build (see above): going on with what guests/build has")
