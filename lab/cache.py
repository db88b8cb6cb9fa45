"""Where the lab keeps its images, wheels and records, and how it locks them."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
"""The working tree that this package was imported from."""


def directory() -> Path:
    """``$XDG_CACHE_HOME/chaos-lab``, made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The base directory specification has relative values ignored.
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    path = root / "chaos-lab"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the exclusive lock ``name`` for the block, waiting for it if need be."""
    with (directory() / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
