"""The lab from outside: real boots, real crashes, and nothing left behind."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
LAB = str(ROOT / "scripts" / "lab")


def lab(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LAB, *arguments],
        **{"capture_output": True, "text": True, "timeout": 400, "stdin": subprocess.DEVNULL}
        | options,
        check=False,
    )


def status() -> Any:
    return json.loads(lab("status", "--json").stdout)["running"]


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends within ``seconds``."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def up() -> Iterator[dict[str, Any]]:
    """A lab that is up for the tests that only run commands in it."""
    done = lab("up")
    assert done.returncode == 0, done.stderr
    yield status()
    lab("down")
    assert status() is None


def test_streams_stay_apart_and_the_status_passes(up: dict[str, Any]) -> None:
    done = lab("exec", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "kill -SEGV $$"], 139),
        (["no-such-command"], 127),
        (["/etc/passwd"], 126),
        (["true"], 0),
    ],
)
def test_every_way_to_end_has_its_status(
    up: dict[str, Any], command: list[str], expected: int
) -> None:
    assert lab("exec", "--", *command).returncode == expected


def test_a_megabyte_goes_in_and_comes_out(up: dict[str, Any]) -> None:
    data = os.urandom(1 << 20)
    done = subprocess.run(
        [LAB, "exec", "--", "cat"], input=data, capture_output=True, timeout=120, check=True
    )
    assert done.stdout == data


def test_output_comes_as_it_is_written(up: dict[str, Any]) -> None:
    with subprocess.Popen(
        [LAB, "exec", "--", "sh", "-c", "echo one; read line; echo $line"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        # The command waits for us, so this line can only come while it runs.
        assert process.stdout.readline() == "one\n"
        process.stdin.write("two\n")
        process.stdin.close()
        assert process.stdout.read() == "two\n"


def test_folders(up: dict[str, Any]) -> None:
    name = f"lab-test-{os.getpid()}"
    source, out = ROOT / "lab-out" / f"{name}.src", ROOT / "lab-out" / name
    source.write_text("from the host")
    script = f"cat /src/lab-out/{name}.src; echo from Dom0 > /out/{name}; touch /src/x"
    try:
        done = lab("exec", "--", "sh", "-c", script)
        assert done.stdout == "from the host"
        assert "Read-only file system" in done.stderr
        assert out.read_text() == "from Dom0\n"
    finally:
        source.unlink()
        out.unlink(missing_ok=True)


def test_commands_run_side_by_side(up: dict[str, Any]) -> None:
    """Four meet at a barrier that none can pass alone."""
    script = (
        "mkdir -p /run/meet; : > /run/meet/$1; until [ $(ls /run/meet | wc -l) = 4 ]; do :; done"
    )
    commands = [
        [LAB, "exec", "--timeout", "60", "--", "sh", "-c", script, "-", str(n)] for n in "1234"
    ]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait(90) for process in processes] == [0] * 4


def test_interrupt_reaches_the_command(up: dict[str, Any]) -> None:
    script = "trap 'echo got INT; exit 3' INT; echo ready; while :; do sleep 0.1; done"
    with subprocess.Popen(
        [LAB, "exec", "--", "sh", "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "got INT\n"
    assert process.returncode == 3


def test_a_killed_client_takes_its_command_along(up: dict[str, Any]) -> None:
    with subprocess.Popen(
        [LAB, "exec", "--", "sh", "-c", "echo $$; exec sleep 1000"],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        pid = process.stdout.readline().strip()
        process.kill()
    script = f"until ! kill -0 {pid} 2>/dev/null; do sleep 0.1; done"
    assert lab("exec", "--timeout", "30", "--", "sh", "-c", script).returncode == 0


def test_a_time_out_ends_the_command_and_not_the_lab(up: dict[str, Any]) -> None:
    done = lab("exec", "--timeout", "2", "--", "sleep", "1234")
    assert done.returncode == 124
    assert "time-out: the command still ran after 2 s" in done.stderr
    script = "while pgrep -f 'sleep 123[4]'; do sleep 0.1; done"
    assert lab("exec", "--timeout", "30", "--", "sh", "-c", script).returncode == 0
    assert running(up["pid"])


def test_a_terminal(up: dict[str, Any]) -> None:
    """stty, size and end of file go through; the lab is entered by `shell` as well."""
    leader, follower = pty.openpty()
    with subprocess.Popen(
        [LAB, "shell"], stdin=follower, stdout=follower, stderr=follower
    ) as process:
        os.close(follower)
        text = b""
        sent = False
        while process.poll() is None or select.select([leader], [], [], 0)[0]:
            if select.select([leader], [], [], 0.2)[0]:
                try:
                    text += os.read(leader, 4096)
                except OSError:
                    break
            if not sent and b"# " in text:
                os.write(leader, b"stty size; test -t 0 && echo a $((6 * 7)) tty; exit 5\r")
                sent = True
    os.close(leader)
    assert b"a 42 tty" in text
    assert process.returncode == 5


def test_edits_are_seen_at_once(up: dict[str, Any]) -> None:
    """A source that changes is installed again before the next command."""
    probe = ROOT / "chaos" / f"_lab_probe_{os.getpid()}.py"
    code = f"import chaos.{probe.stem} as probe; print(probe.VALUE, probe.__file__)"
    try:
        for value in ("1", "2"):
            probe.write_text(f"VALUE = {value}\n")
            done = lab("exec", "-C", "/", "--", "python3", "-c", code)
            assert done.stdout.split()[0] == value, done.stderr
            assert "/dist-packages/chaos/" in done.stdout
    finally:
        probe.unlink()
    assert lab("exec", "-C", "/", "--", "python3", "-c", code).returncode == 1


def test_one_lab_at_a_time(up: dict[str, Any]) -> None:
    done = lab("run", "--", "true")
    assert done.returncode == 125
    assert "a lab runs on this host already: `lab up`" in done.stderr
    assert "scripts/lab down ends it" in done.stderr
    done = lab("up")
    assert done.returncode == 125


def test_status_names_the_lab(up: dict[str, Any]) -> None:
    done = lab("status")
    assert done.stdout.startswith(f"running: lab up, Debian {up['debian']}, Xen {up['xen']}")
    assert str(up["pid"]) in done.stdout
    assert up["xenstored"] is False


def test_a_crash_of_dom0_is_reported_and_ends_qemu(up: dict[str, Any]) -> None:
    """The last test of the lab that is up: it does not survive it."""
    done = lab("exec", "--", "sh", "-c", "echo c > /proc/sysrq-trigger")
    assert done.returncode == 125
    assert "lab: Dom0's kernel panicked: sysrq triggered crash" in done.stderr
    assert "end of the serial log" in done.stderr
    assert gone(up["pid"])
    assert status() is None
    assert not Path(up["serial"]).exists()


def test_run_times_out_and_leaves_nothing() -> None:
    before = time.monotonic()
    with subprocess.Popen(
        [LAB, "run", "--timeout", "5", "--", "sleep", "600"], stderr=subprocess.PIPE, text=True
    ) as process:
        pid = None
        for line in process.stderr:
            if "Dom0 is up" in line:
                pid = status()["pid"]
            if "time-out" in line:
                break
        else:
            line = ""
        process.stderr.read()
    assert "time-out: the command still ran after 5 s" in line
    assert process.returncode == 124
    assert time.monotonic() - before < 300
    assert pid is not None
    assert gone(pid)
    assert status() is None


def test_a_hang_is_reported_and_leaves_nothing() -> None:
    command = [LAB, "run", "--hang-timeout", "5", "--", "sleep", "600"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert any("Dom0 is up" in line for line in process.stderr)
        pid = status()["pid"]
        os.kill(pid, signal.SIGSTOP)
        said = process.stderr.read()
    assert "lab: Dom0 hangs: silent for 5 s" in said
    assert "end of the serial log" in said
    assert process.returncode == 125
    assert gone(pid)
    assert status() is None


REBOOT = """
import ctypes, glob
(path,) = glob.glob("/usr/lib/x86_64-linux-gnu/libxenctrl.so.4.??")
library = ctypes.CDLL(path)
library.xc_interface_open.restype = ctypes.c_void_p
library.xc_send_debug_keys(ctypes.c_void_p(library.xc_interface_open(0, 0, 0)), b"R")
"""
"""Xen's debug key R: the hypervisor resets the machine there and then."""


def test_the_end_of_xen_is_reported() -> None:
    done = lab("run", "--timeout", "60", "--", "python3", "-c", REBOOT)
    assert done.returncode == 125
    assert "'R' pressed -> rebooting machine" in done.stderr
    assert status() is None


def test_qemu_dies_with_its_runner() -> None:
    with subprocess.Popen(
        [LAB, "run", "--", "sleep", "600"], stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if "booting" in line:
                break
        pid = status()["pid"]
        assert running(pid)
        process.kill()
    assert gone(pid)
    assert status() is None


def test_a_terminated_runner_powers_off() -> None:
    with subprocess.Popen([LAB, "up"], stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if "booting" in line:
                break
        pid = status()["pid"]
        process.terminate()
    assert process.returncode == 128 + signal.SIGTERM
    assert gone(pid)
    assert status() is None
