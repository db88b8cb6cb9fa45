"""The lock that says that a daemon runs, and those who only ask."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from noxs import lockfile
from xenctypes.errors import BusError, StateError


def test_one_has_it_and_others_see_it(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    assert not lockfile.held(path)
    fd = lockfile.take(path, "noxsd")
    assert lockfile.held(path)
    descriptors = len(os.listdir("/proc/self/fd"))
    with pytest.raises(BusError, match="another noxsd is running"):
        lockfile.take(path, "noxsd", wait=0)
    with pytest.raises(StateError, match="another chaosd is running") as refused:
        lockfile.take(path, "chaosd", StateError, hint="stop it first", wait=0)
    assert refused.value.hint == "stop it first"
    assert len(os.listdir("/proc/self/fd")) == descriptors
    os.close(fd)
    assert not lockfile.held(path)


def test_whoever_asks_keeps_no_daemon_from_starting(tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    asking = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(asking, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [asking]).start()
    fd = lockfile.take(path, "noxsd", wait=30)
    assert lockfile.held(path)
    os.close(fd)
