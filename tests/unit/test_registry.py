"""Names and records on disk."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from chaos.registry import RUNNING, Record, Registry
from xenctypes.errors import StateError

A = "00000000-0000-4000-8000-00000000000a"
B = "00000000-0000-4000-8000-00000000000b"


@pytest.fixture
def names(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "run"))


def test_a_record_survives(names: Registry) -> None:
    record = Record(A, "web", domid=7, config={"memory": 4})
    with names.reserve(record) as entry:
        record.state = RUNNING
        entry.write(record)
    assert names.uuid_of("web") == A
    assert names.read(A) == record
    assert names.uuids() == [A]
    assert os.stat(names.path).st_mode & 0o777 == 0o700


def test_a_taken_name_or_uuid_is_refused_and_leaves_nothing(names: Registry) -> None:
    names.reserve(Record(A, "web")).close()
    with pytest.raises(StateError, match='"web" exists already'):
        names.reserve(Record(B, "web"))
    with pytest.raises(StateError, match="UUID"):
        names.reserve(Record(A, "other"))
    assert names.uuids() == [A]
    assert names.uuid_of("other") is None
    assert os.listdir(f"{names.path}/domains") == [A]


def test_what_can_be_no_path_is_nobody_s_name(names: Registry) -> None:
    names.prepare()
    for name in ("a\0b", "\ud800", "a" * 300):
        assert names.uuid_of(name) is None


def test_a_name_that_is_taken_waits_for_no_lock(names: Registry) -> None:
    """Its holder may be waiting for netback, and chaosd's loop asks."""
    names.reserve(Record(A, "web")).close()
    other = Registry(names.path)
    with ThreadPoolExecutor(1) as threads:
        with other.locked():
            asked = threads.submit(names.reserve, Record(B, "web"))
            error = asked.exception(30)
        assert "exists already" in str(error)


def test_rename_frees_the_old_name(names: Registry) -> None:
    record = Record(A, "old")
    with names.reserve(record) as entry:
        names.rename(entry, record, "new")
    assert names.uuid_of("old") is None
    assert names.uuid_of("new") == A
    assert names.read(A) == record


def test_rename_to_a_taken_name_changes_nothing(names: Registry) -> None:
    names.reserve(Record(B, "taken")).close()
    record = Record(A, "old")
    with names.reserve(record) as entry, pytest.raises(StateError, match="taken"):
        names.rename(entry, record, "taken")
    assert names.uuid_of("old") == A
    assert names.uuid_of("taken") == B


def test_a_rename_under_the_lock_tells_taken_from_stale(names: Registry) -> None:
    names.reserve(Record(B, "taken")).close()
    os.symlink("00000000-0000-4000-8000-00000000000c", f"{names.path}/names/=stale")
    record = Record(A, "old")
    with names.reserve(record) as entry, names.locked():
        with pytest.raises(StateError, match="taken"):
            names.rename(entry, record, "taken")
        names.rename(entry, record, "stale")
    assert names.uuid_of("stale") == A


def test_mac_addresses_are_given_once(names: Registry) -> None:
    mac = bytes.fromhex("00163e000001")
    names.reserve(Record(A, "web", macs=["00:16:3e:00:00:01"])).close()
    assert names.reserve_mac(mac, A) == mac
    assert names.reserve_mac(mac, A) == mac
    names.reserve(Record(B, "other")).close()
    with pytest.raises(StateError, match='in use by "web"'):
        names.reserve_mac(mac, B)
    with pytest.raises(StateError, match="in use"):
        names.reserve_mac(bytes.fromhex("00163e000002"), B, {"00:16:3e:00:00:02"})
    assert names.reserve_mac(None, B)[:3] == mac[:3]
    record = names.read(A)
    assert record is not None
    with names.entry(A) as entry:
        names.forget(entry, record)
    assert names.reserve_mac(mac, B) == mac


def test_the_mac_address_of_a_domain_that_is_gone_is_free(names: Registry) -> None:
    names.prepare()
    os.symlink(A, f"{names.path}/macs/00:16:3e:00:00:01")
    mac = bytes.fromhex("00163e000001")
    names.reserve(Record(B, "other")).close()
    assert names.reserve_mac(mac, B) == mac
    os.symlink(A, f"{names.path}/macs/00:16:3e:00:00:02")
    names.sweep()
    assert os.listdir(f"{names.path}/macs") == ["00:16:3e:00:00:01"]


def test_rekey_makes_room_for_a_successor(names: Registry) -> None:
    record = Record(A, "web")
    with names.reserve(record) as entry, names.locked():
        names.begin_rekey(entry, record, B, names.free_name("web"))
        names.finish_rekey(entry, record)
    assert names.uuid_of("web") is None
    assert names.uuid_of("web-1") == B
    names.reserve(Record(A, "web")).close()
    assert sorted(names.uuids()) == [A, B]


def test_forget_in_the_middle_of_a_rekey_leaves_no_name(names: Registry) -> None:
    record = Record(A, "web")
    with names.reserve(record) as entry, names.locked():
        names.begin_rekey(entry, record, B, names.free_name("web"))
        names.forget(entry, record)
    assert os.listdir(f"{names.path}/names") == []
    assert names.uuids() == []


def test_an_interrupted_reserve_leaves_nothing_and_takes_nothing(
    names: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = Registry._link

    def interrupted(self: Registry, name: str, uuid: str) -> None:
        link(self, name, uuid)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Registry, "_link", interrupted)
        with pytest.raises(KeyboardInterrupt):
            names.reserve(Record(A, "web"))
    assert os.listdir(f"{names.path}/names") == []
    names.reserve(Record(A, "web")).close()
    with pytest.raises(StateError, match="UUID"):
        names.reserve(Record(A, "web"))
    assert names.uuid_of("web") == A


def test_forget_is_idempotent_and_spares_a_successor_of_the_name(names: Registry) -> None:
    record = Record(A, "web")
    with names.reserve(record) as entry:
        names.forget(entry, record)
        names.forget(entry, record)
    names.reserve(Record(B, "web")).close()
    with names.entry(A) as entry:
        names.forget(entry, record)
    assert names.uuid_of("web") == B


def test_forget_spares_a_successor_of_the_uuid(
    names: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the place as soon as that is free, and there is one moment in which it is empty."""
    record = Record(A, "web", RUNNING, domid=1)
    entry = names.reserve(record)
    rmdir = os.rmdir

    def late(path: str) -> None:
        Registry(names.path).reserve(Record(A, "again", RUNNING, domid=2)).close()
        rmdir(path)

    monkeypatch.setattr(os, "rmdir", late)
    names.forget(entry, record)
    monkeypatch.undo()
    entry.close()
    successor = names.read(A)
    assert successor is not None
    assert (successor.name, successor.domid) == ("again", 2)
    assert names.uuids() == os.listdir(f"{names.path}/domains") == [A]


def test_the_lock_of_an_entry_excludes(names: Registry) -> None:
    with names.reserve(Record(A, "web")), names.entry(A) as other:
        assert not other.lock(wait=False)
    with names.entry(A) as other:
        assert other.lock(wait=False)


def test_a_lock_on_a_forgotten_entry_says_so(names: Registry) -> None:
    with names.entry(A) as entry, pytest.raises(StateError, match="gone"):
        entry.lock(wait=True)


def test_a_damaged_record_is_an_error_of_ours() -> None:
    for text in ("", "{", "[]", '{"format": 1}', '{"format": 2, "uuid": "x", "name": "y"}'):
        with pytest.raises(StateError):
            Record.from_json(text)


def test_what_a_killed_maker_left_is_swept(names: Registry) -> None:
    names.prepare()
    child = multiprocessing.get_context("fork").Process(target=lambda: None)
    child.start()
    pid = child.pid
    child.join()
    stale = Path(names.path, "domains", f".new-{pid}-{A}")
    stale.mkdir()
    (stale / "domain.json").touch()
    mine = Path(names.path, "domains", f".new-{os.getpid()}-{B}")
    mine.mkdir()
    assert names.has_stale_staging()
    names.sweep()
    assert not stale.exists()
    assert mine.exists()
    assert names.uuids() == []


def _race(path: str, uuid: str, start: "multiprocessing.synchronize.Barrier", out: object) -> None:
    names = Registry(path)
    start.wait()
    try:
        names.reserve(Record(uuid, "prize")).close()
        out.put(uuid)  # type: ignore[attr-defined]
    except StateError:
        out.put(None)  # type: ignore[attr-defined]


def test_of_racing_creates_one_wins(names: Registry) -> None:
    context = multiprocessing.get_context("fork")
    names.prepare()
    for round_ in range(20):
        barrier, out = context.Barrier(4), context.SimpleQueue()
        uuids = [f"{round_:08}-0000-4000-8000-{n:012}" for n in range(4)]
        racers = [
            context.Process(target=_race, args=(names.path, uuid, barrier, out)) for uuid in uuids
        ]
        for racer in racers:
            racer.start()
        winners = [uuid for uuid in (out.get() for _ in racers) if uuid]
        for racer in racers:
            racer.join()
        assert len(winners) == 1
        assert names.uuid_of("prize") == winners[0]
        assert names.uuids() == winners
        record = names.read(winners[0])
        assert record is not None
        with names.entry(winners[0]) as entry:
            names.forget(entry, record)


def test_links_of_what_is_gone_are_swept(names: Registry) -> None:
    names.reserve(Record(A, "here")).close()
    names.link_name("gone", B)
    names.reserve_mac(b"\x00\x16\x3e\x00\x00\x01", B)
    with names.locked():
        names.sweep()
    assert names.uuid_of("gone") is None
    assert names.uuid_of("here") == A
    assert os.listdir(f"{names.path}/macs") == []


def test_writers_do_not_take_each_others_files(names: Registry) -> None:
    record = Record(A, "one")
    with names.reserve(record):
        pass

    def write(count: int) -> None:
        for number in range(count):
            names.entry(A).write(replace(record, domid=number))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, [100] * 4))
    assert names.read(A) == replace(record, domid=99)
    assert os.listdir(f"{names.path}/domains/{A}") == ["domain.json"]
