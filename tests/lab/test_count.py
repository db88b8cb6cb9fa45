"""Many guests by one command: all of them, or none, or all that can be; and their end."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import threading
from typing import TYPE_CHECKING

import pytest
from chaosd import GUESTS, filled, running

from chaos.client import Chaos

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from chaos.host import Host

PATIENCE = 600.0

pytestmark = pytest.mark.usefixtures("network")


class Terminal:
    """A terminal, and all that was shown on it."""

    def __init__(self) -> None:
        self._ours, self.fd = pty.openpty()
        self._shown = b""
        self._more = threading.Condition()
        self._end = os.eventfd(0)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            ready = select.select([self._ours, self._end], [], [])[0]
            if self._ours in ready:
                with self._more:
                    self._shown += os.read(self._ours, 65536)
                    self._more.notify_all()
            elif ready:
                return

    def until(self, shows: Callable[[str], bool]) -> None:
        """Wait until what was shown is so."""
        with self._more:
            # A character may have come in part.
            waited = self._more.wait_for(
                lambda: shows(self._shown.decode(errors="ignore")), PATIENCE
            )
        assert waited, self._shown

    def shown(self) -> str:
        """All of it; no more is shown from now on."""
        os.eventfd_write(self._end, 1)
        self._reader.join()
        for fd in (self._ours, self.fd, self._end):
            os.close(fd)
        return self._shown.decode()


def command(*argv: str, until: Callable[[str], bool] | None = None) -> tuple[int, list[str], str]:
    """Run a command at a terminal: its status, the lines it printed to a pipe, what it showed.

    ``until``: what it shows when it is interrupted.
    """
    terminal = Terminal()
    try:
        with subprocess.Popen(
            ["chaos", *argv],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal.fd, text=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        ) as run:  # fmt: skip
            if until is not None:
                try:
                    terminal.until(until)
                finally:
                    run.send_signal(signal.SIGINT)
            printed, _ = run.communicate(timeout=PATIENCE)
    finally:
        shown = terminal.shown()
    return run.returncode, printed.splitlines(), shown


@pytest.fixture
def config(tmp_path: Path) -> Iterator[str]:
    """A configuration on a file system of Dom0's own, and a daemon with some shells for it."""
    kernel = tmp_path / "hello.elf"
    with open(f"{GUESTS}/hello.elf", "rb") as image:
        kernel.write_bytes(image.read())
    path = tmp_path / "many.cfg"
    path.write_text(f'name="web"\nmemory=4\nkernel="{kernel}"\n')
    warm = f'[[flavour]]\nname="many"\nmemory=4\nkernel="{kernel}"\nsize=8\n'
    with running(f"[daemon]\nbuilders = 2\n{warm}"), Chaos() as chaos:
        filled(chaos)
        yield str(path)


def test_all_or_none_or_all_that_can_be(
    host: Host, thorough: bool, nothing_left: None, config: str
) -> None:
    count = 500 if thorough else 60
    names = [f"web-{n}" for n in range(1, count + 1)]
    status, lines, shown = command("create", config, f"--count={count}")
    assert status == 0, shown[-500:]
    made = [re.fullmatch(r"created (\S+), domain (\d+)", line) for line in lines]
    assert [each and each[1] for each in made] == names
    assert len({each and each[2] for each in made}) == count
    assert f"{count}/{count}" in bars(shown, "creating")
    with Chaos() as chaos:
        for name in names:
            assert chaos.call("wait", domain=name, timeout=60)["outcome"] == "ready"
    status, lines, shown = command("destroy", "--all")
    assert (status, lines) == (0, []), shown[-500:]
    assert bars(shown, "destroying")[-1:] in ([], [f"{count}/{count}"])  # in no second: none

    with Chaos() as chaos:
        assert guests(chaos) == set()
        last = f"api-{count}"
        chaos.call("create", path=config, overrides=[f'name="{last}"'])
        status, lines, shown = command("create", config, f"--count={count}", "--name=api-{n}")
        assert (status, lines) == (1, [])
        assert shown.count(f'a domain named "{last}" exists already') == 1
        assert guests(chaos) == {last}  # none

        argv = ("create", "-q", config, f"--count={count}", "--name=api-{n}", "--keep-going")
        status, lines, shown = command(*argv)
        assert (status, lines) == (1, [])
        assert shown.count("exists already") == shown.count("\n") == 1, shown[-500:]
        assert guests(chaos) == {f"api-{n}" for n in range(1, count + 1)}  # all that can be
        status, lines, shown = command("--no-daemon", "destroy", "--all")
        assert (status, lines) == (0, []), shown[-500:]
        assert bars(shown, "destroying")[-1:] in ([], [f"{count}/{count}"])  # in no second: none
        assert guests(chaos) == set()


def bars(shown: str, what: str) -> list[str]:
    """How much was done of how much, each time that a bar was drawn."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    return re.findall(rf"{what} \S+ (\d+/\d+) ", plain)


def guests(chaos: Chaos) -> set[str]:
    return {domain["name"] for domain in chaos.call("list")} - {"Domain-0"}


def test_many_are_shut_down(nothing_left: None, config: str) -> None:
    """Some of them do not answer; with -q nothing moves."""
    status, _, shown = command("create", "-q", config, "--count=12")
    assert (status, shown) == (0, "")
    with Chaos() as chaos:
        for name in ("web-3", "web-4"):
            assert chaos.call("wait", domain=name, timeout=60)["outcome"] == "ready"
            chaos.pause(name)
    showing = command(
        "shutdown", "-a", "-w", until=lambda shown: "10/12" in bars(shown, "shutting down")
    )
    assert showing[0] == 130
    status, lines, shown = command("shutdown", "-a", "-w", "--timeout=2")
    assert (status, lines) == (124, []), shown[-500:]
    late = {f'chaos: domain "web-{n}" has not answered' for n in (3, 4)}
    assert late == set(re.findall(r"chaos: domain \S+ has not answered", shown))
    status, lines, shown = command("shutdown", "-a", "-w", "-q", "--timeout=2")
    assert (status, lines) == (124, [])
    assert {line.partition(";")[0] for line in shown.splitlines()} == late
