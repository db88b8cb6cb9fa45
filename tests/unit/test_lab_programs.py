"""The command and chaosd as children of the tests in Dom0."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chaos import __version__

sys.path.append(str(Path(__file__).parents[1] / "lab"))

import programs

SHOW = """
import os, sys, threading, signal
print(sys.argv[1:], open("/proc/self/comm").read().strip(), dict(os.environ))
print([fd for fd in range(3, 200) if os.path.exists(f"/proc/self/fd/{fd}")])
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def run(*argv: str, **options: Any) -> tuple[int, str, str]:
    pipe = subprocess.PIPE
    process = programs.start(*argv, stdout=pipe, stderr=pipe, text=True, **options)
    said, complained = process.communicate(timeout=60)
    return process.returncode, said, complained


def test_a_program_runs() -> None:
    assert run("chaos", "--version") == (0, f"chaos {__version__}\n", "")
    status, said, complained = run("chaosd", "--help")
    assert (status, complained) == (0, "")
    assert said.startswith("usage: chaosd")
    status, said, complained = run("chaos", "nonsense")
    assert (status, said) == (2, "")
    assert 'no verb "nonsense"' in complained


def test_it_has_nothing_of_the_test() -> None:
    with open(os.devnull) as kept:
        os.set_inheritable(kept.fileno(), True)
        status, said, _ = run("chaosd", "--version", code=SHOW, env={"A": "b"})
    assert status == 0
    first, fds, handler, version = said.splitlines()
    assert first == "['--version'] chaosd {'A': 'b'}"
    assert fds == "[]"
    assert handler == "True"
    assert version == f"chaosd {__version__}"


@pytest.mark.parametrize(
    ("code", "status", "complaint"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit('no')", 1, "no"),
        ("raise ValueError('so')", programs.EX_SOFTWARE, "ValueError: so"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -15, ""),
    ],
)
def test_every_end_has_its_status(code: str, status: int, complaint: str) -> None:
    got, said, complained = run("chaos", "list", code=code)
    assert (got, said) == (status, "")
    assert complaint in complained
