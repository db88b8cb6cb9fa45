"""The command in a child of the test: as in a shell, but for Python's start, seconds here."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import programs

PATIENCE = 120.0


def chaos(
    *argv: str, check: bool = True, stdin: int | None = None, timeout: float = PATIENCE
) -> subprocess.CompletedProcess[str]:
    """Run `chaos ARGV`; with ``check`` it must succeed. ``stdin`` as for subprocess.run.

    Tests of races between whole processes start the installed command.
    """
    out, err = os.memfd_create("stdout"), os.memfd_create("stderr")
    try:
        process = start(*argv, stdin=stdin, stdout=out, stderr=err)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired as expired:
            process.kill()
            process.wait()
            expired.output, expired.stderr = _content(out), _content(err)
            raise
        done = subprocess.CompletedProcess(
            ["chaos", *argv], status, *(_content(fd).decode(errors="replace") for fd in (out, err))
        )
    finally:
        os.close(out)
        os.close(err)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def start(*argv: str, **options: Any) -> subprocess.Popen[Any]:
    """The same, under way; ``options`` are Popen's."""
    return programs.start("chaos", *argv, **options)


def _content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)
