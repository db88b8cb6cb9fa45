"""What a client wants created, ready to be compared with what the pool has.

Reading and checking a configuration costs more than the rest of a warm create, so what was read
stays here for as long as the file is the same; a request that only chooses another name is served
from it too.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from chaos import config as configuration
from chaos import image
from chaos.daemon.flavour import Source
from chaos.daemon.rights import Peer, borrowed
from chaos.shape import Shape, shape_of
from noxs.page import more_pages
from xenctypes.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chaos.domconfig import DomainConfig
    from chaos.image import Identity, OpenImage
    from chaos.shape import ImageKey

CACHED_MAX = 256
TEXT_MAX = 1 << 14
LONG = 1 << 12
"""Characters of a configuration with its overrides that are read on the event loop."""
CPUS_MAX = 1 << 17
"""Characters of all vCPUs' sets of CPUs, half of what a shell maker takes."""
_NAME = re.compile(r"""\s*name\s*=\s*(?:"([^"\\]*)"|'([^'\\]*)')\s*;?\s*""")


class NotHere(Exception):
    """The path means something only in the client's own process: it shall do this itself."""


class TooLong(Exception):
    """A configuration that takes long to read: not for the event loop. ``read`` reads it."""

    def __init__(self, read: Callable[[], Wanted], keep: Callable[[Wanted], None]) -> None:
        super().__init__()
        self.read = read
        self.keep = keep
        self.name: str | None = None


class Wanted(NamedTuple):
    """A configuration, and what follows from it.

    ``pages`` is how many pages the device page needs beyond its first, ``json_rest`` the
    configuration as JSON from behind its name on.
    """

    config: DomainConfig
    shape: Shape
    source: Source
    pages: int
    json_rest: str
    warnings: tuple[str, ...]

    @property
    def json(self) -> str:
        """The configuration as the record keeps it."""
        return f'{{"name": {json.dumps(self.config.name)}{self.json_rest}'

    def named(self, name: str) -> Wanted:
        """The same under another name. ConfigError."""
        return self._replace(config=self.config.named(name))

    def key(self, peer: Peer) -> ImageKey:
        """The version of the image that its paths name now, if the peer may read it. ImageError."""
        key = None if peer.uid else self.source.key()
        if key is not None:
            return key
        # Of the very files that the peer could open: a path may name another one next. For root
        # this says what is wrong.
        opened = self.open(peer)
        try:
            return self.source.key_of(opened)
        finally:
            for each in opened:
                each.close()

    def open(self, peer: Peer) -> list[OpenImage]:
        """The images, opened with the peer's rights; the caller closes them. ImageError."""
        with borrowed(peer):
            return self.source.open()


def want(config: DomainConfig, warnings: Sequence[str] = ()) -> Wanted:
    """A checked configuration made ready. ConfigError for what cannot be created yet."""
    configuration.supported(config)
    table = config.as_dict()
    if sum(map(len, table["cpus"])) > CPUS_MAX:
        raise config.error("the CPUs of so many vCPUs are too long a list", "cpus")
    text = json.dumps(table)
    name = json.dumps(config.name)
    return Wanted(
        config,
        shape_of(config),
        Source(config.kernel, config.ramdisk, config.cmdline),
        more_pages(len(config.vifs) + len(config.disks), len(config.metadata)),
        text.removeprefix(f'{{"name": {name}'),
        tuple(warnings),
    )


def _without_name(overrides: Sequence[str]) -> tuple[str | None, tuple[str, ...]]:
    """The name that one of the overrides gives and nothing else, and the other overrides.

    None if there is no such one, or if another one behind it may give a name too.
    """
    for index in range(len(overrides) - 1, -1, -1):
        match = _NAME.fullmatch(overrides[index])
        if match:
            name = match[1] if match[1] is not None else match[2]
            return name, (*overrides[:index], *overrides[index + 1 :])
        if "name" in overrides[index]:
            break
    return None, tuple(overrides)


class Reader:
    """Reads configurations, with a memory."""

    def __init__(self) -> None:
        self._cache: OrderedDict[tuple[Peer, str, tuple[str, ...]], tuple[Identity, Wanted]] = (
            OrderedDict()
        )
        self._texts: OrderedDict[tuple[Peer, str], tuple[Identity, bytes]] = OrderedDict()

    def read(self, peer: Peer, directory: str, path: str, overrides: Sequence[str]) -> Wanted:
        """The configuration in a file, with overrides. ConfigError; NotHere; TooLong."""
        full = os.path.join(directory, path)
        if full.startswith(("/dev/", "/proc/")) or not os.path.isabs(full):
            raise NotHere  # in the latter case the client's directory has no path
        name, rest = _without_name(overrides)
        try:
            with borrowed(peer):
                found = self._find(peer, full, path, directory, rest)
        except TooLong as long:
            long.name = name
            raise
        return found if name is None else found.named(name)

    def _find(
        self, peer: Peer, full: str, path: str, directory: str, overrides: tuple[str, ...]
    ) -> Wanted:
        try:
            status = os.stat(full)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ConfigError(f"cannot read the configuration: {reason}", filename=path) from error
        if not stat.S_ISREG(status.st_mode):
            raise NotHere
        identity = image.identity(status)
        key = (peer._replace(pid=0), full, overrides)
        cached = self._cache.get(key)
        if cached is not None and cached[0] == identity:
            self._cache.move_to_end(key)
            return cached[1]
        fresh = identity.just_written
        text = self._text(peer, full, path, identity, fresh=fresh)

        def parse() -> Wanted:
            config, warnings = configuration.interpret(
                text, path, overrides, directory=directory, regular=True
            )
            return want(config, warnings)

        def read() -> Wanted:
            with borrowed(peer):
                return parse()

        def keep(wanted: Wanted) -> None:
            # A metadata file may change by itself, and a new file without a word of that.
            if not (wanted.config.metadata_file or fresh):
                self._cache[key] = identity, wanted
                if len(self._cache) > CACHED_MAX:
                    self._cache.popitem(last=False)

        if len(text) + sum(map(len, overrides)) > LONG:
            raise TooLong(read, keep)
        wanted = parse()
        keep(wanted)
        return wanted

    def _text(self, peer: Peer, full: str, path: str, identity: Identity, *, fresh: bool) -> bytes:
        """The file's text, from memory for a version that the peer has had read before."""
        key = (peer._replace(pid=0), full)
        cached = self._texts.get(key)
        if cached is not None and cached[0] == identity:
            self._texts.move_to_end(key)
            return cached[1]
        text = configuration.read(path, full.removesuffix(path), regular=True)
        if len(text) <= TEXT_MAX and not fresh:
            self._texts[key] = identity, text
            if len(self._texts) > CACHED_MAX:
                self._texts.popitem(last=False)
        return text
