"""Configurations that the daemon reads for its clients, and remembers."""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chaosd_peer import PATIENCE, Lab, holds, run

from chaos import frames, image, xlcfg
from chaos.config import interpret
from chaos.configjson import from_dict
from chaos.daemon import wanted as module
from chaos.daemon.flavour import Source
from chaos.daemon.rights import Peer
from chaos.daemon.wanted import NotHere, Reader, want
from chaos.image import OpenImage
from xenctypes.errors import ConfigError, ImageError, StateError

ROOT = Peer(1, 0, 0, ())
MINE = Peer(1, os.getuid(), os.getgid(), ())


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that was written long ago."""
    monkeypatch.setattr(image, "JUST_NS", 0)
    path = tmp_path / "a.cfg"
    path.write_text('name="a"\nmemory=4\nkernel="k.elf"\nvif=["bridge=br"]\n')
    return path


def test_what_is_the_same_is_read_once(config: Path) -> None:
    reader = Reader()
    first = reader.read(MINE, str(config.parent), "a.cfg", [])
    assert reader.read(MINE, str(config.parent), "a.cfg", []) is first
    assert first.config.kernel == str(config.parent / "k.elf")
    other = reader.read(MINE, str(config.parent), "a.cfg", ["memory=5"])
    assert other.config.memory == 5
    config.write_text('name="b"\nmemory=6\nkernel="k.elf"\n')
    assert reader.read(MINE, str(config.parent), "a.cfg", []).config.name == "b"


def test_a_file_s_text_is_read_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader()
    reader.read(MINE, str(config.parent), "a.cfg", ["memory=5"])
    monkeypatch.setattr(os, "open", None)
    assert reader.read(MINE, str(config.parent), "a.cfg", ["memory=6"]).config.memory == 6


def test_a_file_that_was_written_this_moment_is_read_again(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be written once more within a tick of the clock that stamps it."""
    monkeypatch.setattr(image, "JUST_NS", 1 << 62)
    reader = Reader()
    before = os.stat(config)
    first = reader.read(MINE, str(config.parent), "a.cfg", [])
    monkeypatch.setattr(os, "stat", lambda _: before)
    config.write_text(config.read_text().replace("memory=4", "memory=5"))
    again = reader.read(MINE, str(config.parent), "a.cfg", [])
    other = reader.read(MINE, str(config.parent), "a.cfg", ["vcpus=2"])
    assert [each.config.memory for each in (first, again, other)] == [4, 5, 5]


def test_what_the_daemon_has_open_is_not_named_by_its_number(tmp_path: Path, config: Path) -> None:
    """A path through /proc/self means what the one has who says it."""
    secret = tmp_path / "secret"
    secret.write_text("of the daemon")
    fd = os.open(secret, os.O_RDONLY)
    try:
        link = tmp_path / "link"
        link.symlink_to("/proc/self/fd")
        for path in (f"/proc/self/fd/{fd}", f"//proc/self/fd/{fd}", f"{link}/{fd}"):
            override = f'noxs_metadata_file="{path}"'
            with pytest.raises(ConfigError, match="Too many levels of symbolic links"):
                Reader().read(MINE, "/", str(config), [override])
            with pytest.raises(ImageError, match="Too many levels"):
                Source(path, "", "").open()
        with pytest.raises(ConfigError, match="procfs would tell of chaosd"):
            Reader().read(MINE, "/", str(config), ['noxs_metadata_file="/proc/self/maps"'])
    finally:
        os.close(fd)


def outcome(read: Callable[[], object]) -> object:
    """What is read, or what is wrong."""
    try:
        return read()
    except ConfigError as error:
        return error.message


@pytest.mark.parametrize(
    "overrides",
    [
        ['name="x"', "memory=5"],
        ["memory=5", 'name="x"'],
        ['name="x"', "name='y'", "vcpus=2"],
        ['name="x"', 'memory=5; name="y"'],
        ['name="x"', "vif=['bridge=b,vifname=v']"],
        ['name="x"; memory=5', 'name="y"'],
        ['name="x" "y"', "memory=5"],
    ],
)
def test_a_name_is_taken_from_any_override_as_the_parser_does(
    config: Path, overrides: list[str]
) -> None:
    reader = Reader()

    def parsed() -> object:
        text = config.read_bytes()
        return interpret(text, str(config), overrides, directory="/", regular=True)[0]

    for _ in range(2):  # the second time from memory
        found = outcome(lambda: reader.read(MINE, "/", str(config), overrides).config)
        assert found == outcome(parsed)


def test_a_name_alone_costs_no_reading(config: Path) -> None:
    reader = Reader()
    base = reader.read(MINE, str(config.parent), str(config), [])
    named = reader.read(MINE, str(config.parent), str(config), ['name="other"'])
    assert named.config.name == "other"
    assert named.config.vifs is base.config.vifs
    assert named.shape == base.shape
    assert from_dict(json.loads(named.json)) == named.config
    assert (
        reader.read(
            MINE, str(config.parent), str(config), ["memory=5", " name = 'x' ;"]
        ).config.memory
        == 5
    )
    with pytest.raises(ConfigError, match="do not print"):
        reader.read(MINE, str(config.parent), str(config), ['name="a/b"'])


def test_what_is_no_file_is_the_client_s_business(tmp_path: Path, config: Path) -> None:
    reader = Reader()
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/stdin", "/proc/self/fd/0", str(tmp_path / "pipe"), str(tmp_path)):
        with pytest.raises(NotHere):
            reader.read(MINE, "/", path, [])
    with pytest.raises(NotHere):
        reader.read(MINE, "", "a.cfg", [])  # from a directory that was removed
    with pytest.raises(ConfigError, match="cannot read the configuration: No such file"):
        reader.read(MINE, "/", str(tmp_path / "none"), [])
    config.write_text(f'name="a"\nkernel="k"\nnoxs_metadata_file="{tmp_path}/pipe"\n')
    with pytest.raises(ConfigError, match="the metadata is no regular file"):
        reader.read(MINE, str(config.parent), str(config), [])


def test_a_missing_image_is_named(config: Path) -> None:
    wanted = Reader().read(MINE, str(config.parent), str(config), [])
    with pytest.raises(ImageError, match=r"k\.elf' cannot be opened: No such file"):
        wanted.key(MINE)
    kernel = config.parent / "k.elf"
    kernel.write_bytes(b"x")
    before = wanted.key(MINE)
    assert wanted.key(MINE) == before
    kernel.write_bytes(b"y")
    os.utime(kernel, ns=(before.kernel.mtime_ns, before.kernel.mtime_ns))
    assert wanted.key(MINE) != before


def test_a_member_gets_the_key_of_what_he_could_open(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of what the path names a moment later."""
    kernel, secret = config.parent / "k.elf", config.parent / "secret"
    kernel.write_bytes(b"x")
    secret.write_bytes(b"root's own")
    wanted = Reader().read(MINE, str(config.parent), str(config), [])
    mine = image.identity(os.stat(kernel))
    really = Source.open

    def open_and_swap(source: Source) -> list[OpenImage]:
        opened = really(source)
        kernel.unlink()
        kernel.symlink_to(secret)
        return opened

    monkeypatch.setattr(Source, "open", open_and_swap)
    monkeypatch.setattr(module, "borrowed", lambda _peer: contextlib.nullcontext())
    key = wanted.key(Peer(1, 1000, 1000, ()))
    assert (key.kernel.inode, key.kernel.size) == (mine.inode, mine.size)


@pytest.mark.skipif(os.getuid() != 0, reason="takes on another user's rights")
def test_files_are_opened_with_the_client_s_rights(config: Path) -> None:
    nobody = Peer(1, 65534, 65534, ())
    reader = Reader()
    for path in (config.parent, *config.parent.parents):
        if path != Path("/tmp") and str(path).startswith("/tmp"):
            path.chmod(0o755)
    config.chmod(0o600)
    reader.read(ROOT, str(config.parent), str(config), [])
    with pytest.raises(ConfigError, match="Permission denied"):
        reader.read(nobody, str(config.parent), str(config), [])
    config.chmod(0o640)
    os.chown(config, 0, 4242)
    with pytest.raises(ConfigError, match="Permission denied"):
        reader.read(nobody, str(config.parent), str(config), [])
    member = nobody._replace(groups=(4242,))
    assert reader.read(member, str(config.parent), str(config), []).config.name == "a"
    kernel = config.parent / "k.elf"
    kernel.write_bytes(b"x")
    kernel.chmod(0o600)
    wanted = reader.read(member, str(config.parent), str(config), [])
    with pytest.raises(ImageError, match="Permission denied"):
        wanted.key(member)
    assert os.stat(config).st_uid == 0
    with open(kernel, "rb") as file:  # our own rights are back
        assert file.read() == b"x"


LIST = ", ".join(["1"] * 20000)


@pytest.mark.parametrize("through", ["command", "path", "config"])
def test_a_long_configuration_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    """It is read in a thread, once; here by one that reads it when told to."""
    text = f'name="a"\nkernel="k.elf"\nmemory=8\nx=[{LIST}]\n'
    (tmp_path / "long.cfg").write_text(text)
    begun, go = threading.Event(), threading.Event()
    parse = xlcfg.parse

    def slowly(*args: Any) -> Any:
        begun.set()
        assert go.wait(PATIENCE)
        return parse(*args)

    monkeypatch.setattr(xlcfg, "parse", slowly)
    monkeypatch.setattr(image, "JUST_NS", 0)  # else it is not kept
    null = os.open(os.devnull, os.O_RDWR)

    async def story(lab: Lab) -> None:
        # What follows takes a host, which is not there; its place is known.
        monkeypatch.setattr(lab.daemon, "create", refuse)
        with await lab.client() as client, await lab.client() as other:
            fds = (null, null, null)
            if through == "command":
                await client.run(1, "create", "long.cfg", fds=fds, cwd=str(tmp_path))
            elif through == "path":
                await client.ask(1, "create", path=str(tmp_path / "long.cfg"))
            else:
                await client.ask(1, "create", config=text)
            await holds(begun.is_set)
            await other.ask(1, "version")
            assert (await other.reply())[1] == frames.OK
            go.set()
            reply = await client.reply()
            assert reply.value == 1 or reply.value["message"] == "no host"
            if through != "config":
                monkeypatch.setattr(xlcfg, "parse", None)
                peer = next(iter(lab.server.connections)).peer
                again = lab.daemon.reader.read(
                    peer, str(tmp_path), "long.cfg" if through == "command" else
                    str(tmp_path / "long.cfg"), ['name="b"'],
                )  # fmt: skip
                assert again.config.name == "b"

    async def refuse(*_: Any, **__: Any) -> Any:
        raise StateError("no host")

    run(tmp_path, story)
    os.close(null)


def test_many_vcpus_with_the_same_cpus_cost_little(tmp_path: Path) -> None:
    text = 'name="a"\nkernel="k"\nvcpus=8192\ncpus=[{}]\n'
    cpus = ", ".join(['"0-1000"'] * 8192)
    config, _ = interpret(text.format(cpus), "a.cfg", [], directory="/", regular=True)
    first, *others = config.affinity
    assert all(each is first for each in others)
    wanted = want(config)
    assert from_dict(json.loads(wanted.json)) == config
    start = time.process_time()
    for _ in range(300):
        hash(wanted.shape)
    assert time.process_time() - start < 3  # seconds: it hashed a thousand CPUs for each vCPU


def test_many_vcpus_with_long_lists_of_cpus_are_refused() -> None:
    text = 'name="a"\nkernel="k"\nvcpus=8192\ncpus="{}"\n'
    every_second = ",".join(map(str, range(0, 500, 2)))
    config, _ = interpret(text.format(every_second), "a.cfg", [], directory="/", regular=True)
    with pytest.raises(ConfigError, match="too long a list") as raised:
        want(config)
    assert raised.value.line == 4
