"""Sizes, records, crash signs, sources: the lab's host side without QEMU."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import cache, cli, machine, project, serial, suite
from lab.errors import UsageError
from lab.machine import Machine, Options, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("17G", 17 << 30), ("2048K", 2 << 20), ("64", 64 << 20), ("1g", 1 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.text(max_size=8))
def test_any_other_size_is_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_size(text) > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options(memory=1 << 50), "does not fit this machine"),
        (Options(memory=1 << 30, dom0_memory=1 << 30), "does not fit a lab of 1024 MB"),
        (Options(dom0_memory=64 << 20), "does not start in 64 MB"),
        (Options(cpus=10_000), "this machine has"),
        (Options(cpus=0), "this machine has"),
        (Options(cpus=1, dom0_cpus=2), "the lab has 1"),
    ],
)
def test_what_does_not_fit_is_refused(options: Options, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        options.check()


@pytest.mark.parametrize(
    ("line", "sign"),
    [
        (b"(XEN) Panic on CPU 0:", "Xen panicked"),
        (
            b"[   11.9] Kernel panic - not syncing: sysrq triggered crash",
            "Dom0's kernel panicked: sysrq triggered crash",
        ),
        (b"(XEN) Hardware Dom0 crashed: rebooting machine in 5 seconds.", "Dom0 crashed"),
        (b"lab init: a mount failed (see above)", "Dom0 did not start: a mount failed (see above)"),
        (b"(d3) Kernel panic - not syncing: a guest may write what it likes", ""),
        (b"(XEN) Brought up 2 CPUs", ""),
        (b"lab init: some modules did not load", ""),
    ],
)
def test_signs_of_a_crash(line: bytes, sign: str) -> None:
    assert serial.crash_in(line) == sign


def test_a_log_is_followed_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "serial.log"
    log = serial.SerialLog(path)
    assert log.crash() == ""
    with path.open("wb") as file:
        for part, sign in [
            (b"(XEN) fine\r\n(XEN) Pani", ""),
            (b"c on CP", ""),
            (b"U 1:\r\n", "Xen panicked"),
            (b"(XEN) more\r\n", ""),
        ]:
            file.write(part)
            file.flush()
            assert log.crash() == sign
    assert log.tail().splitlines()[-1] == "(XEN) more"


def test_xen_is_asked_about_a_dom0_that_hangs(tmp_path: Path) -> None:
    path, line = tmp_path / "serial.log", tmp_path / "serial"
    path.write_text("(XEN) fine\r\n")
    typed = b""

    def xen() -> None:
        nonlocal typed
        connection, _ = server.accept()
        with connection:
            typed = connection.recv(100)
            with path.open("a") as log:
                log.write("(XEN) 'i' pressed -> dumping interrupt information\r\n")

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(line))
        server.listen()
        thread = threading.Thread(target=xen)
        thread.start()
        said = serial.SerialLog(path).interrogation(line)
        thread.join()
    assert typed == b"\x01\x01\x010raize"
    assert said.startswith("(XEN) fine\n---")
    assert said.endswith("dumping interrupt information\n")
    # QEMU is gone: what there is.
    assert "(XEN) fine" in serial.SerialLog(path).interrogation(line)


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with subprocess.Popen(["sleep", "60"]) as process:
        lab = Machine(
            verb="up",
            options=Options(memory=1 << 30),
            folder=tmp_path / "folder",
            token="00",
            tree="/src",
            since=time.time(),
            pid=process.pid,
            started=machine._start_time(process.pid),
        )
        lab.folder.mkdir()
        lab.save()
        yield lab
        process.kill()


def test_the_record_survives_and_ends_with_its_process(record: Machine) -> None:
    found = machine.current()
    assert found is not None
    assert (found.options, found.folder, found.pid) == (record.options, record.folder, record.pid)
    assert found.alive()
    assert not found.wait(0)
    found.kill()
    assert not found.alive()
    assert machine.current() is None
    assert not record.folder.exists()


def test_a_reused_pid_is_not_ours(record: Machine) -> None:
    record.started += 1
    record.save()
    assert machine.current() is None
    os.kill(record.pid, 0)


def test_a_broken_record_is_no_lab(record: Machine) -> None:
    (cache.directory() / "lab.json").write_text("{")
    assert machine.current() is None


def test_labs_of_different_names_do_not_meet(
    record: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHAOS_LAB", "second")
    assert machine.current() is None
    assert machine.others()[""].pid == record.pid
    record.save()
    assert machine.current() is not None
    monkeypatch.delenv("CHAOS_LAB")
    assert list(machine.others()) == ["second"]
    monkeypatch.setenv("CHAOS_LAB", "../x")
    with pytest.raises(UsageError, match="CHAOS_LAB"):
        machine.current()


def test_the_wheel_depends_on_sources_alone(tmp_path: Path) -> None:
    (tmp_path / "chaos").mkdir()
    (tmp_path / "chaos" / "a.py").write_text("1")
    (tmp_path / "tests").mkdir()
    before = project.digest(tmp_path)
    (tmp_path / "tests" / "test_a.py").write_text("")
    (tmp_path / "chaos" / "__pycache__").mkdir()
    (tmp_path / "chaos" / "__pycache__" / "a.pyc").write_text("")
    os.utime(tmp_path / "chaos" / "a.py", (0, 0))
    assert project.digest(tmp_path) == before
    (tmp_path / "chaos" / "a.py").write_text("2")
    assert project.digest(tmp_path) != before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "--debian", "9", "--", "true"], "invalid choice"),
        (["run", "--memory", "much", "--", "true"], "not a memory size"),
        (["run", "--timeout", "-1", "--", "true"], "number of seconds"),
        (["run"], "CMD"),
        (["nonsense"], "invalid choice"),
        ([], "VERB"),
    ],
)
def test_a_wrong_command_line_is_status_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as status:
        cli.main(argv)
    assert status.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["build", "run", "shell", "up", "exec", "down", "status"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        cli.main([verb, "--help"])
    assert status.value.code == 0
    assert "exit status" in capsys.readouterr().out


@pytest.fixture
def no_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.usefixtures("no_lab")
def test_exec_and_down_without_a_lab(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["exec", "--", "true"]) == 125
    assert "no lab is up (scripts/lab up boots one)" in capsys.readouterr().err
    assert cli.main(["down"]) == 0
    assert cli.main(["status", "--json"]) == 0
    assert '"running": null' in capsys.readouterr().out


@pytest.mark.usefixtures("no_lab")
def test_a_bad_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "-e", "novalue", "--", "true"]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err


def shell(name: str, script: str) -> suite.Part:
    return suite.Part(name, ["sh", "-c", script])


def test_parts_run_side_by_side_and_are_shown_in_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first ends after the second and the third."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    parts = [
        shell("first", f"echo one; cat {fifo}; echo two"),
        shell("second", "echo three; echo four >&2; exit 3"),
        shell("third", f"echo five >{fifo}; echo six"),
    ]
    results = suite._Runner(parts).run(2)
    assert [(result.part.name, result.status) for result in results] == [
        ("first", 0),
        ("second", 3),
        ("third", 0),
    ]
    said = [line for line in capfd.readouterr().out.splitlines() if line and line[0] != "="]
    live = [line for line in said if not line.startswith("--")]
    assert live == ["one", "five", "two", "three", "four", "six"]
    assert "-------- meanwhile, second: FAILED" in said


def test_one_lab_runs_at_a_time(tmp_path: Path) -> None:
    alone = f"mkdir {tmp_path}/lab && cat {tmp_path}/fifo && rmdir {tmp_path}/lab"
    os.mkfifo(tmp_path / "fifo")
    parts = [
        shell("lab a", alone),
        shell("lab b", f"mkdir {tmp_path}/lab"),
        shell("unit", f"echo >{tmp_path}/fifo"),
    ]
    assert [result.status for result in suite._Runner(parts).run(2)] == [0, 0, 0]


def test_a_lab_that_broke_down_is_tried_once_more(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fails_once = f"[ -e {tmp_path}/x ] || {{ touch {tmp_path}/x; exit 125; }}"
    (good, bad) = suite._Runner([shell("lab a", fails_once), shell("lab b", "exit 125")]).run(1)
    assert (good.status, bad.status) == (0, 125)
    assert capfd.readouterr().out.count("one more try") == 2


def test_the_summary_counts_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "print('===== 3 passed, 1 skipped in 0.10s =====')"
    monkeypatch.setattr(suite.debian, "ensure", lambda *_: None)
    monkeypatch.setattr(
        suite,
        "_parts",
        lambda _: iter(
            [
                suite.Part("good", [sys.executable, "-c", script]),
                suite.Part("empty", [sys.executable, "-c", "raise SystemExit(5)"], True),
            ]
        ),
    )
    monkeypatch.chdir(cache.TREE)
    assert suite.main([]) == 0
    assert "3 passed, 1 skipped in 0.10s" in capsys.readouterr().out.split("summary")[1]
    bad = suite.Part("bad", ["false"])
    monkeypatch.setattr(suite, "_parts", lambda _: iter([bad]))
    assert suite.main([]) == 1
    assert "FAILED (status 1)" in capsys.readouterr().out


def test_a_host_gets_the_files_with_tests_for_it() -> None:
    everything = suite._files("noxs", brief=False)
    assert "tests/lab/test_systemd.py" in everything
    assert suite._files("systemd", brief=False) == [
        "tests/lab/test_lab.py",
        "tests/lab/test_systemd.py",
    ]
    for host, brief, marks in (
        ("xenstored", False, ("anyhost", "xenstored")),
        ("noxs", True, ("every_release",)),
    ):
        chosen = suite._files(host, brief=brief)
        assert set(chosen) < set(everything)
        for name in everything:
            text = (cache.TREE / name).read_text()
            assert (name in chosen) == any(f"pytest.mark.{mark}" in text for mark in marks), name


def test_a_sample_is_chosen_again(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = suite._parser().parse_args(["lab", "--host=noxs", "--debian=12"])
    monkeypatch.delenv(suite.DAY, raising=False)
    (part,) = suite._parts(arguments)
    assert not any(suite.DAY in word for word in part.command)
    monkeypatch.setenv(suite.DAY, "3")
    (part,) = suite._parts(arguments)
    assert "--env=CHAOS_TEST_DAY=3" in part.command[: part.command.index("--")]
