"""The command in a child of the test: as in a shell, but for Python's start, a second here."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import traceback
from importlib import import_module
from typing import NoReturn

from chaos import cli

for _verb in cli.VERBS.values():
    import_module(f"chaos.verbs.{_verb.module}")  # here, once, rather than in each child

PATIENCE = 120.0


def chaos(
    *argv: str, check: bool = True, stdin: int | None = None, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run `chaos ARGV`; with ``check`` it must succeed. ``stdin`` as for subprocess.run.

    Tests of what a process does (signals, terminals, races) start the installed command.
    """
    out, err = os.memfd_create("stdout"), os.memfd_create("stderr")
    try:
        pid = os.fork()
        if pid == 0:
            _become_command(argv, stdin, out, err)
        status = _wait(pid, timeout)
        if status is None:
            raise subprocess.TimeoutExpired(["chaos", *argv], timeout, *map(_content, (out, err)))
        done = subprocess.CompletedProcess(
            ["chaos", *argv], status, _content(out).decode(), _content(err).decode()
        )
    finally:
        os.close(out)
        os.close(err)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def _become_command(argv: tuple[str, ...], stdin: int | None, out: int, err: int) -> NoReturn:
    status = 70  # EX_SOFTWARE: nothing that the command exits with
    try:
        if stdin == subprocess.DEVNULL:
            stdin = os.open(os.devnull, os.O_RDONLY)
        for fd, wanted in enumerate((0 if stdin is None else stdin, out, err)):
            os.dup2(wanted, fd)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the child's life
            for fd, mode in enumerate(("r", "w", "w"))
        )
        status = cli.main(argv)
        sys.stdout.flush()
    except BaseException:  # noqa: BLE001 - it has nowhere to go
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, timeout: float) -> int | None:
    """The child's exit code, or None after killing it."""
    child = os.pidfd_open(pid)
    try:
        ended = bool(select.select([child], [], [], timeout)[0])
        if not ended:
            signal.pidfd_send_signal(child, signal.SIGKILL)
    finally:
        os.close(child)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if ended else None


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
