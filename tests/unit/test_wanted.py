"""Configurations that the daemon reads for its clients, and remembers."""

import contextlib
import json
import os
from pathlib import Path

import pytest

from chaos import image
from chaos.configjson import from_dict
from chaos.daemon import wanted as module
from chaos.daemon.flavour import Source
from chaos.daemon.rights import Peer
from chaos.daemon.wanted import NotHere, Reader
from chaos.image import OpenImage
from xenctypes.errors import ConfigError, ImageError

ROOT = Peer(1, 0, 0, ())
MINE = Peer(1, os.getuid(), os.getgid(), ())


@pytest.fixture
def config(tmp_path: Path) -> Path:
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
