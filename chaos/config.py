"""From an xl.cfg(5) file and the command line to a DomainConfig.

::

    file + overrides --xlcfg.parse--> Document --from_document--> DomainConfig --supported--> create

``load`` reads files, the rest is pure.  Settings mean what they mean to xl (Xen's
tools/xl/xl_parse.c, parse_config_data); docs/config.md lists them, and where we differ: a value
of the wrong kind or out of range is an error here, where xl warns and takes the default.

Configurations come from other people: sizes, counts and lengths are bounded, by constants here
and in the modules that this one is built on.
"""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from chaos import xlcfg
from chaos.domconfig import (
    DISKS_MAX,
    LIMITS,
    TSC_MODES,
    VIFS_MAX,
    DomainConfig,
    check_name,
)
from chaos.xldoc import Atom, Document, Setting, printable, quote
from chaos.xlkeys import IGNORED, REFUSED
from noxs.abi import MAX_METADATA
from xenctypes.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chaos.cpuspec import CpuSet
    from chaos.diskspec import DiskConfig
    from chaos.vifspec import VifConfig
    from chaos.xldoc import Value

__all__ = ["UNDERSTOOD", "DomainConfig", "check_name", "from_document", "load", "supported"]

_INTEGERS = ("memory", "maxmem", "vcpus", "maxvcpus", *LIMITS)
_ACTIONS = ("on_poweroff", "on_reboot", "on_watchdog", "on_crash", "on_soft_reset")
UNDERSTOOD = (
    *("name", "uuid", "type", "builder", "kernel", "ramdisk", "cmdline", "root", "extra"),
    *_INTEGERS,
    *_ACTIONS,
    *("cpus", "tsc_mode", "vif", "disk", "noxs_metadata", "noxs_metadata_file"),
)
_WARNINGS_MAX = 20  # of unknown and of repeated settings; a hostile file could hold 300,000

# What the tree holds and a create cannot do yet: setting, whether a configuration asks for it, why.
NOT_YET: tuple[tuple[str, Callable[[DomainConfig], bool], str], ...] = (
    (
        "vif",
        lambda config: any(vif.backend not in {"", "0", "Domain-0"} for vif in config.vifs),
        "vifs served by another domain than Domain-0 are not supported yet",
    ),
)

_HEX = frozenset("0123456789abcdefABCDEF")
T = TypeVar("T")


def load(
    path: str, overrides: Sequence[str] = (), *, directory: str = "", regular: bool = False
) -> tuple[DomainConfig, list[str]]:
    """Read a file and ``key=value`` texts that go before it; also return warnings, one line each.

    Relative paths, ``path`` and those in the file, are relative to ``directory``, by default the
    working directory, as with xl; the result has absolute ones, and the metadata file's content.
    With ``regular``, for another process, nothing but regular files is read, so that nobody is kept
    waiting. Raise ConfigError.
    """
    directory = directory or os.getcwd()
    text = read(path, directory, regular=regular)
    return interpret(text, path, overrides, directory=directory, regular=regular)


def read(path: str, directory: str, *, regular: bool) -> bytes:
    """A configuration file's text. Raise ConfigError."""
    full = os.path.join(directory, path)
    return _read(full, path, xlcfg.MAX_BYTES, "configuration", regular=regular)


def interpret(
    text: bytes | str, path: str, overrides: Sequence[str], *, directory: str, regular: bool
) -> tuple[DomainConfig, list[str]]:
    """``load`` for a text that was read from ``path``."""
    config, warnings = from_document(xlcfg.parse(text, path, overrides), directory=directory)
    if config.metadata_file:
        config = with_metadata(config, regular=regular)
    return config, warnings


def with_metadata(config: DomainConfig, *, regular: bool = False) -> DomainConfig:
    """The configuration with what its metadata file holds. ConfigError."""
    try:
        file = config.metadata_file
        metadata = _read(file, file, MAX_METADATA, "metadata", regular=regular)
    except ConfigError as error:
        cause = f"{error.filename}: {error.cause}"
        raise config.error(cause, "noxs_metadata_file", hint=error.hint) from error
    return replace(config, metadata=metadata)


def _read(path: str, shown: str, limit: int, what: str, *, regular: bool) -> bytes:
    """At most ``limit`` bytes of a file; of a pipe as well, which never ends up in memory whole."""
    try:
        with open(path, "rb", opener=_opener() if regular else None) as file:
            if regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"the {what} is no regular file", filename=printable(shown))
            data = file.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        cause = f"cannot read the {what}: {reason}"
        raise ConfigError(cause, filename=printable(shown)) from error
    if len(data) > limit:
        cause = f"the {what} is longer than {limit} bytes"
        raise ConfigError(cause, filename=printable(shown))
    return data


def _opener() -> Callable[[str, int], int]:
    from chaos.opening import open_for_others  # the command reads its files itself

    return open_for_others


def supported(config: DomainConfig) -> None:
    """Raise ConfigError for what the tree can say and a create cannot do yet."""
    for key, wanted, cause in NOT_YET:
        if wanted(config):
            raise config.error(cause, key)
    if config.disks:
        from chaos.disk import check_supported

        for disk in config.disks:
            try:
                check_supported(disk)
            except ConfigError as error:
                raise config.error(error.cause, "disk", hint=error.hint) from None


def from_document(document: Document, *, directory: str = "") -> tuple[DomainConfig, list[str]]:
    """Check a document; also return warnings, one line each.

    Relative paths are joined to ``directory``; no file is looked at.  Raise ConfigError.
    """
    return _Reader(document, directory).config()


class _Reader:
    """Takes the settings out of one document and names the place of what is wrong with them."""

    def __init__(self, document: Document, directory: str) -> None:
        self.document = document
        self.directory = directory
        self.warnings = list(document.warnings)

    def config(self) -> tuple[DomainConfig, list[str]]:
        """Everything, in an order that puts the plainest mistakes first."""
        self.look_over()
        document = self.document
        values: dict[str, Any] = {
            **{key: document.string(key) for key in ("name", *_ACTIONS)},
            **{key: self.integer(key) for key in _INTEGERS},
            "uuid": self.uuid(),
            "type": self.type(),
            "kernel": self.path("kernel"),
            "ramdisk": self.path("ramdisk"),
            "cmdline": self.cmdline(),
            "tsc_mode": self.tsc_mode(),
            "vifs": self.vifs(),
            "disks": self.disks(),
            **self.metadata(),
            "places": {
                name: document.source.place(setting.value.offset)
                for name, setting in document.last.items()
                if name in UNDERSTOOD
            },
        }
        for key in ("name", "kernel"):
            if not values[key]:
                cause = f"{key} is not set" if values[key] is None else f"{key} is empty"
                raise self.error(cause, key)
        given = {key: value for key, value in values.items() if value is not None}
        try:
            config = DomainConfig(**given)
            config = replace(config, affinity=self.affinity(config.maxvcpus))
        except ConfigError as error:
            raise (
                error if error.line else self.error(error.cause, error.key, error.hint)
            ) from None
        return config, self.warnings

    def error(self, cause: str, key: str, hint: str = "") -> ConfigError:
        """An error about a setting; about the file when that is not set."""
        setting = self.document.get(key)
        if setting is None:
            filename = self.document.source.pieces[0][1]
            return ConfigError(cause, hint=hint, key=key, filename=filename)
        return self.document.error(cause, setting.value.offset, hint=hint, key=key)

    def warn(self, cause: str, offset: int) -> None:
        """Keep a line for the user."""
        self.warnings.append(f"{self.document.source.place(offset)}: {cause}")

    def look_over(self) -> None:
        """Names that mean nothing to us, or that stand twice."""
        unknown = []
        for name, setting in self.document.last.items():
            if name in REFUSED and not _asks_nothing(setting.value, REFUSED[name][1]):
                raise self.error(f"{name} is not supported: {REFUSED[name][0]}", name)
            if name in IGNORED and not _asks_nothing(setting.value, ()):
                self.warn(
                    f"{name} is not supported by chaos, ignored: {IGNORED[name]}", setting.offset
                )
            if name not in UNDERSTOOD and name not in REFUSED and name not in IGNORED:
                unknown.append(setting)
        self.some(unknown, _unknown)
        repeated = []
        seen: set[tuple[str, str]] = set()
        for setting in self.document.settings:
            filename = self.document.source.filename(setting.offset)
            if (setting.name, filename) in seen and not setting.added:
                repeated.append(setting)
            if filename != xlcfg.COMMAND_LINE:  # where it is the purpose
                seen.add((setting.name, filename))
        self.some(repeated, lambda name: f"{name} is set again, the last one counts")

    def some(self, settings: list[Setting], cause: Callable[[str], str]) -> None:
        """Warn of each, up to a point."""
        for setting in settings[:_WARNINGS_MAX]:
            self.warn(cause(setting.name), setting.offset)
        if len(settings) > _WARNINGS_MAX:
            left = len(settings) - _WARNINGS_MAX
            self.warn(f"and {left} more like it", settings[_WARNINGS_MAX].offset)

    def integer(self, key: str) -> int | None:
        """A number; 0 is no size."""
        value = self.document.integer(key)
        if value == 0 and key in {"memory", "maxmem"}:
            raise self.error(f"{key} is 0", key, "it counts MiB")
        return value

    def path(self, key: str) -> str | None:
        """A path, absolute when we know where from."""
        path = self.document.string(key)
        return os.path.join(self.directory, path) if path else path

    def uuid(self) -> bytes | None:
        """As uuid_parse of libuuid, which libxl calls: 8-4-4-4-12 hexadecimal digits."""
        text = self.document.string("uuid")
        if text is None:
            return None
        groups = text.split("-")
        digits = "".join(groups)
        if [len(group) for group in groups] != [8, 4, 4, 4, 12] or set(digits) - _HEX:
            raise self.error(f"{quote(text)} is no UUID", "uuid", "8-4-4-4-12 hexadecimal digits")
        return bytes.fromhex(digits)

    def type(self) -> str | None:
        """The domain's type, by ``type`` or the older ``builder``."""
        found = self.document.string("type")
        builder = self.document.string("builder")
        if builder is not None:
            old = {"generic": "pv", "hvm": "hvm"}.get(builder)
            if old is None:
                raise self.error(f"unknown builder {quote(builder)}", "builder", "use type")
            if found not in {None, old}:
                raise self.error("builder and type contradict each other", "builder", "use type")
            found = old
        if found == "hvm":
            key = "type" if builder is None else "builder"
            raise self.error("HVM domains are not supported, they need a device model", key)
        return found

    def cmdline(self) -> str | None:
        """``cmdline``, or else ``root`` and ``extra`` put together (xl_parse.c, parse_cmdline)."""
        cmdline, root, extra = (self.document.string(key) for key in ("cmdline", "root", "extra"))
        if cmdline is None:
            words = ([] if root is None else [f"root={root}"]) + ([] if extra is None else [extra])
            return " ".join(words)
        for key in ("root", "extra"):
            setting = self.document.get(key)
            if setting is not None:
                self.warn(f"{key} is ignored in favour of cmdline", setting.offset)
        return cmdline

    def tsc_mode(self) -> str | None:
        """By name or, as xl has it too, by number."""
        text = self.document.string("tsc_mode")
        return TSC_MODES[int(text)] if text in {"0", "1", "2"} else text or None

    def affinity(self, maxvcpus: int) -> tuple[CpuSet, ...]:
        """``cpus``: one list for all vCPUs, or one for each; more than there are do not count."""
        setting = self.document.get("cpus")
        if setting is None:
            return ()
        from chaos.cpuspec import parse_cpus

        if isinstance(setting.value, Atom):
            return (self.located(setting.value, "cpus", parse_cpus),) * maxvcpus
        atoms = self.atoms("cpus", maxvcpus)
        return tuple(self.located(atom, "cpus", parse_cpus) for atom in atoms)

    def vifs(self) -> tuple[VifConfig, ...]:
        """Each item of ``vif``, numbered from 0."""
        atoms = self.atoms("vif")
        if not atoms:
            return ()
        from chaos.vifspec import parse_vif

        return tuple(
            self.warned(atom, "vif", partial(parse_vif, devid=number))
            for number, atom in enumerate(atoms)
        )

    def disks(self) -> tuple[DiskConfig, ...]:
        """Each item of ``disk``."""
        atoms = self.atoms("disk")
        if not atoms:
            return ()
        from chaos.diskspec import parse_disk

        return tuple(self.warned(atom, "disk", parse_disk) for atom in atoms)

    def warned(self, atom: Atom, key: str, parser: Callable[[str], tuple[T, list[str]]]) -> T:
        """Run a parser of a device; its errors and warnings get the place in the file."""
        device, warnings = self.located(atom, key, parser)
        for warning in warnings[:_WARNINGS_MAX]:
            self.warn(warning, atom.offset)
        return device

    def atoms(self, key: str, limit: int | None = None) -> list[Atom]:
        """The items of a list, none of them a list; those beyond ``limit`` do not count."""
        items = (self.document.items(key) or ())[:limit]
        most = {"vif": VIFS_MAX, "disk": DISKS_MAX}.get(key, len(items))
        if len(items) > most:
            raise self.document.error(
                f"more than {most} items in {key}", items[most].offset, key=key
            )
        for item in items:
            if not isinstance(item, Atom):
                raise self.document.error(f"a list within {key}", item.offset, key=key)
        return [item for item in items if isinstance(item, Atom)]

    def located(self, atom: Atom, key: str, parser: Callable[[str], T]) -> T:
        """Run a parser of a value's text; its errors get the place in the file."""
        try:
            return parser(atom.text)
        except ConfigError as error:
            offset = atom.at(error.column - 1) if error.column else atom.offset
            raise self.document.error(error.cause, offset, hint=error.hint, key=key) from None

    def metadata(self) -> dict[str, Any]:
        """``noxs_metadata`` as bytes, or the path in ``noxs_metadata_file``."""
        text, path = self.document.string("noxs_metadata"), self.path("noxs_metadata_file")
        if text is not None and path:
            raise self.error("noxs_metadata is given as well", "noxs_metadata_file", "drop one")
        metadata = None if text is None else text.encode("utf-8", "surrogateescape")
        return {"metadata": metadata, "metadata_file": path}


def _asks_nothing(value: Value, harmless: tuple[str, ...]) -> bool:
    """Whether a setting is there and asks for nothing."""
    if isinstance(value, Atom):
        return value.text in {"", "0", *harmless}
    return not value.items


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name[:64], (*UNDERSTOOD, *REFUSED, *IGNORED), 1, 0.7)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"unknown setting {quote(name)}, ignored{hint}"
