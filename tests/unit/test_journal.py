import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noxs.journal import Journal
from xenctypes.errors import StateError


def reopened(path: Path) -> tuple[Journal, bytes | None, list[bytes]]:
    journal = Journal(str(path))
    return journal, *journal.recover()


def test_an_empty_directory_has_no_state(tmp_path: Path) -> None:
    journal, state, records = reopened(tmp_path)
    assert (state, records) == (None, [])
    journal.replace(b"first")
    journal.append(b"one")
    journal.close()
    journal, state, records = reopened(tmp_path)
    assert (state, records) == (b"first", [b"one"])
    journal.append(b"two")
    assert reopened(tmp_path)[1:] == (b"first", [b"one", b"two"])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=5), st.data())
def test_a_torn_record_is_cut_off_wherever_it_is_torn(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], data: Any
) -> None:
    path = tmp_path_factory.mktemp("journal")
    journal = Journal(str(path))
    journal.recover()
    journal.replace(b"s")
    ends = [0]
    for record in records:
        journal.append(record)
        ends.append(journal.length)
    journal.close()
    length = data.draw(st.integers(0, ends[-1]))
    os.truncate(path / "log.0", length)
    whole = max(i for i, end in enumerate(ends) if end <= length)
    journal, _, got = reopened(path)
    assert got == records[:whole]
    journal.append(b"next")
    assert reopened(path)[2] == [*records[:whole], b"next"]


def test_a_flipped_bit_ends_the_log_there(tmp_path: Path) -> None:
    journal, *_ = reopened(tmp_path)
    journal.replace(b"s")
    journal.append(b"one")
    journal.append(b"two")
    journal.close()
    data = bytearray((tmp_path / "log.0").read_bytes())
    data[-1] ^= 1
    (tmp_path / "log.0").write_bytes(data)
    assert reopened(tmp_path)[2] == [b"one"]


def test_rotation_leaves_one_generation(tmp_path: Path) -> None:
    journal, *_ = reopened(tmp_path)
    journal.replace(b"old")
    journal.append(b"one")
    journal.rotate(lambda: b"new")
    journal.append(b"two")
    assert journal.settle()
    assert sorted(os.listdir(tmp_path)) == ["log.1", "snapshot.1"]
    assert reopened(tmp_path)[1:] == (b"new", [b"two"])


def test_a_kill_while_the_snapshot_is_written_loses_nothing(tmp_path: Path) -> None:
    journal, *_ = reopened(tmp_path)
    journal.replace(b"old")
    journal.append(b"one")
    journal.rotate(lambda: os._exit(1))
    journal.append(b"two")
    (tmp_path / "snapshot.1.new").write_bytes(b"half")
    assert reopened(tmp_path)[1:] == (b"old", [b"one", b"two"])
    assert not journal.settle()
    journal.rotate(lambda: b"new")
    journal.append(b"three")
    journal.settle()
    assert reopened(tmp_path)[1:] == (b"new", [b"three"])
    assert sorted(n for n in os.listdir(tmp_path) if not n.endswith(".new")) == [
        "log.2",
        "snapshot.2",
    ]


def test_replacing_leaves_a_snapshot_and_nothing_else(tmp_path: Path) -> None:
    journal, *_ = reopened(tmp_path)
    journal.replace(b"old")
    journal.append(b"one")
    journal.replace(b"last")
    journal.close()
    assert reopened(tmp_path)[1:] == (b"last", [])


def test_a_kill_before_the_first_snapshot_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "log.0").touch()
    journal, state, records = reopened(tmp_path)
    assert (state, records) == (None, [])
    journal.replace(b"first")
    assert reopened(tmp_path)[1:] == (b"first", [])


def test_a_full_file_system_refuses_a_record_and_keeps_the_log_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, *_ = reopened(tmp_path)
    journal.replace(b"s")
    journal.append(b"one")
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    with pytest.raises(OSError, match="no space"):
        journal.append(b"two")
    monkeypatch.undo()
    journal.append(b"three")
    assert reopened(tmp_path)[2] == [b"one", b"three"]


@pytest.mark.parametrize("fails", ["write", "open"])
def test_a_snapshot_that_has_no_room_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    journal, *_ = reopened(tmp_path)
    journal.replace(b"s")
    journal.append(b"one")

    def full(*_: object) -> int:
        raise OSError(28, "full")

    for _ in range(3):
        if fails == "write":
            monkeypatch.setattr("noxs.journal.crc32", full)
        else:
            monkeypatch.setattr(os, "open", full)
        with pytest.raises(OSError, match="full"):
            journal.replace(b"t")
        monkeypatch.undo()
        assert len(list(tmp_path.iterdir())) <= 3  # the snapshot, its log, the next log
    assert not list(tmp_path.glob("*.new"))
    journal.append(b"two")
    assert reopened(tmp_path)[1:] == (b"s", [b"one", b"two"])
    journal.replace(b"t")
    journal.append(b"three")
    (tmp_path / "snapshot.9.new").touch()  # of a writer that was killed
    assert reopened(tmp_path)[1:] == (b"t", [b"three"])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change", ["version", "damage", "no snapshot"])
def test_what_cannot_be_trusted_is_refused(tmp_path: Path, change: str) -> None:
    journal, *_ = reopened(tmp_path)
    journal.replace(b"state")
    journal.append(b"record")
    journal.close()
    path = tmp_path / "snapshot.0"
    data = bytearray(path.read_bytes())
    if change == "version":
        data[4] += 1
    else:
        data[-1] ^= 1
    path.write_bytes(data)
    if change == "no snapshot":
        path.unlink()
    with pytest.raises(StateError, match=r"version|damaged|without a snapshot") as refused:
        reopened(tmp_path)
    assert "reboot the host" in refused.value.hint


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "snapshot.0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"symbolic|loop|levels"):
        reopened(tmp_path)
