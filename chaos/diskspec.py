"""One virtual disk as in ``disk=`` of xl.cfg(5).  Pure.

The syntax of xl-disk-configuration(5): positional (``TARGET,FORMAT,VDEV,ACCESS``), key=value, and
the prefixes of xm, read as by the scanner of libxlutil (Xen's tools/libs/util/libxlu_disk_l.l and
libxlu_disk.c), which tests/unit/test_diskspec.py holds this against.  The scanner takes the rule
that matches longest, and of two as long the first; its quirks follow from that and are kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Any

from chaos.vdev import parse_vdev
from chaos.xldoc import quote
from xenctypes.errors import ConfigError

MAX_TEXT = 8192  # characters of one disk: a path of PATH_MAX and more
FORMATS = ("raw", "qcow", "qcow2", "vhd", "empty", "qed")
SPECIFICATIONS = ("xen", "virtio")
BACKENDS = ("phy", "tap", "qdisk", "standalone")

_STRINGS = ("target", "vdev", "script", "backend")
_KEYS = (*_STRINGS, "format", "backendtype", "specification", "access", "devtype")
_ATOI = re.compile(r"[ \t\n\v\f\r]*[+-]?0*[1-9]")


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig:
    """A virtual disk; construction checks the values and raises ConfigError.

    ``target``      path or other name of what holds the blocks; "" for an empty drive
    ``format``      one of FORMATS
    ``vdev``        the name in the guest, such as xvda or hdc; also d0p0 or a number
    ``writable``    whether the guest may write
    ``backendtype`` one of BACKENDS, or "" to choose by the target
    ``backend``     domain that serves the disk, name or number, or "" for Dom0
    ``script``      the block script that prepares the target, or ""
    ``cdrom`` ``removable``  a CD drive; a medium that may be absent
    ``discard``     whether the guest may punch holes, None for the backend's default
    ``direct_io_safe``  the target's cache may be bypassed (O_DIRECT)
    ``specification``  "xen" or "virtio": what the guest sees
    ``trusted``     whether the guest is told to trust its backend
    """

    vdev: str
    target: str = ""
    format: str = "raw"
    writable: bool = True
    backendtype: str = ""
    backend: str = ""
    script: str = ""
    cdrom: bool = False
    removable: bool = False
    discard: bool | None = None
    direct_io_safe: bool = False
    specification: str = "xen"
    trusted: bool = True

    def __post_init__(self) -> None:
        parse_vdev(self.vdev)
        for key, known in (
            ("format", FORMATS),
            ("backendtype", ("", *BACKENDS)),
            ("specification", SPECIFICATIONS),
        ):
            if getattr(self, key) not in known:
                raise ConfigError(f"unknown {key} {quote(getattr(self, key))}", key=key)
        if self.cdrom and (self.writable or not self.removable):
            raise ConfigError("a CD drive is removable and read-only", key="cdrom")
        if not self.target and not self.removable:
            raise ConfigError("no target, and the disk is not removable", key="target")
        for key in ("target", "script", "backend"):
            if not getattr(self, key).isprintable():
                raise ConfigError(f"{key} has characters that do not print", key=key)

    @property
    def devid(self) -> int:
        """The number of the virtual device, which names it in the store."""
        return parse_vdev(self.vdev)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return asdict(self)


def parse_disk(text: str, *more: str) -> tuple[DiskConfig, list[str]]:
    """Read one disk.  Also return warnings.  ``more`` goes on where ``text`` ends.

    Raise ConfigError; its ``column`` is the position in the text, from 1.
    """
    if len(text) + sum(map(len, more)) > MAX_TEXT:
        raise ConfigError(f"a disk is longer than {MAX_TEXT} characters")
    scan = _Scan(text)
    scan.run()
    for part in more:
        scan.text, scan.at = part, 0
        scan.run()
    try:
        strings, chosen, flags = scan.settle()
        # Each by its own name and type.
        return DiskConfig(**strings, **chosen, **flags), scan.warnings  # type: ignore[arg-type]
    except ConfigError as error:
        column = scan.places.get(error.key, 0) + 1
        raise ConfigError(error.cause, hint=error.hint, key=error.key, column=column) from None


class _Scan:
    """The state that the scanner's rules share; a value not given is None."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.places: dict[str, int] = {}
        self.strings: dict[str, str] = {}  # target, vdev, script, backend
        self.chosen: dict[str, str] = {}  # format, backendtype, specification
        self.flags: dict[str, bool] = {}
        self.old_prefix = False
        self.access_given = False
        self.warnings: list[str] = []

    def run(self) -> None:
        """Take the longest match, the first of equals, until the text is used up."""
        while self.at < len(self.text):
            found = None
            for rule, action in _RULES:
                match = rule.match(self.text, self.at)
                if match and (found is None or match.end() > found[0].end()):
                    found = match, action
            if found is None:
                if self.at == len(self.text) - 1:  # the scanner stops before it complains
                    return
                raise self.error("bad disk syntax")
            match, action = found
            action(self, match[1].removesuffix(","))
            self.at = match.end(1)

    def error(self, cause: str, hint: str = "") -> ConfigError:
        return ConfigError(cause, hint=hint, column=self.at + 1)

    def save(self, key: str, value: str) -> None:
        """Set a string; only an empty one may be set again."""
        if self.strings.get(key):
            raise self.error(f"{key} is given twice")
        self.strings[key] = value
        self.places[key] = self.at

    def choose(self, key: str, value: str, known: tuple[str, ...]) -> None:
        """Set one of a few values; it may be repeated, not changed."""
        if value not in known:
            raise self.error(f"unknown {key} {quote(value)}", "known are " + ", ".join(known))
        if self.chosen.setdefault(key, value) != value:
            raise self.error(f"{key} is given twice")
        self.places.setdefault(key, self.at)

    def format(self, value: str) -> None:
        self.choose("format", value or "raw", FORMATS)

    def access(self, value: str) -> None:
        if value not in {"r", "ro", "rw", "w", ""}:
            raise self.error(f"unknown access {quote(value)}", "known are ro and rw")
        self.flags["writable"] = value not in {"r", "ro"}

    def positional(self, value: str) -> None:
        """Target, format, vdev and access in turn, whichever is still open."""
        if "target" not in self.strings:
            self.save("target", value)
        elif not self.old_prefix and "format" not in self.chosen:
            if not self.strings["target"] and self.vdev_and_type(value):
                self.chosen["format"] = "empty"
            else:
                self.format(value)
        elif "vdev" not in self.strings:
            if not self.vdev_and_type(value):
                self.save("vdev", value)
        elif not self.access_given:
            self.access_given = True
            self.access(value)
        else:
            raise self.error("too many positional parameters")

    def devtype(self, kind: str) -> None:
        raise self.error(f"unknown devtype {quote(kind)}", "known are cdrom and disk")

    def vdev_and_type(self, value: str) -> bool:
        """Take hdc:cdrom and the like; say whether it was one."""
        vdev, colon, kind = value.rpartition(":")
        if not colon:
            return False
        self.save("vdev", vdev)
        if kind not in {"cdrom", "disk"}:
            self.devtype(kind)
        self.flags["cdrom"] = kind == "cdrom"
        return True

    def prefix(self, word: str) -> None:
        self.old_prefix = True
        self.warnings.append(f"disk: the prefix {word} is deprecated")

    def script_prefix(self, word: str) -> None:
        self.prefix(word)
        self.save("script", f"block-{word[:-1]}")

    def format_prefix(self, word: str) -> None:
        self.prefix(word)
        self.format(word[:-1])

    def ignore(self, word: str) -> None:
        """A key that only COLO looks at; still checked as xl does."""
        key, _, value = word.partition("=")
        if key == "colo-port" and _ATOI.match(value) is None:
            raise self.error(f"{key} {quote(value)} is no port")
        if key not in {"colo", "no-colo", "colo-port"}:
            self.save(key, value)
        self.warnings.append(f"disk: {key} is for COLO only, ignored")

    def unknown(self, word: str) -> None:
        """No such key: name the nearest."""
        key = word.partition("=")[0]
        near = get_close_matches(key[:32], _KEYS, 1)
        cause = f"{quote(key + '=')} is no key of a disk"
        raise self.error(cause, f"did you mean {near[0]}=?" if near else "")

    def unknown_prefix(self, word: str) -> None:
        raise self.error(f"unknown prefix {quote(word)}", "a target with a : needs target=")

    def settle(self) -> tuple[dict[str, str], dict[str, str], dict[str, bool]]:
        """What was said, with the rules of xlu_disk_parse for what was not."""
        flags, chosen = dict(self.flags), dict(self.chosen)
        if flags.get("cdrom"):
            flags |= {"removable": True, "writable": False}
            if not self.strings.get("target"):
                chosen["format"] = "empty"
        if "vdev" not in self.strings:
            raise ConfigError("no vdev is given", hint="for example vdev=xvda", key="vdev")
        if "target" not in self.strings and not flags.get("removable"):
            raise ConfigError("no target is given", key="target")
        strings = {key: value for key, value in self.strings.items() if key in _STRINGS}
        return strings, chosen, flags


Action = Callable[[_Scan, str], None]


def _value(word: str) -> str:
    return word.partition("=")[2]


def _flag(key: str, value: bool) -> Action:
    return lambda scan, _: scan.flags.update({key: value})


def _string(key: str) -> Action:
    return lambda scan, word: scan.save(key, _value(word))


def _choice(key: str, known: tuple[str, ...]) -> Action:
    return lambda scan, word: scan.choose(key, _value(word), known)


# In the scanner's order.  Group 1 is what a rule takes; what follows it counts for the length.
_RULES: tuple[tuple[re.Pattern[str], Action], ...] = tuple(
    (re.compile(rule), action)
    for rule, action in (
        (r"([ \t\n]+)(?:[^ \t\n].*)?", lambda *_: None),
        (r"(format=[^,]*,?)", lambda scan, word: scan.format(_value(word))),
        (r"(cdrom,?)", _flag("cdrom", True)),
        (r"(devtype=cdrom,?)", _flag("cdrom", True)),
        (r"(devtype=disk,?)", _flag("cdrom", False)),
        (r"(devtype=[^,]*,?)", lambda scan, word: scan.devtype(_value(word))),
        (r"(access=[^,]*,?)", lambda scan, word: scan.access(_value(word))),
        (r"(backend=[^,]*,?)", _string("backend")),
        (r"(backendtype=[^,]*,?)", _choice("backendtype", BACKENDS)),
        (r"(specification=[^,]*,?)", _choice("specification", SPECIFICATIONS)),
        (r"(vdev=[^,]*,?)", _string("vdev")),
        (r"(script=[^,]*,?)", _string("script")),
        (r"(direct-io-safe,?)", _flag("direct_io_safe", True)),
        (r"(discard,?)", _flag("discard", True)),
        (r"(no-discard,?)", _flag("discard", False)),
        (r"((?:no-)?colo,?)", _Scan.ignore),
        (r"((?:colo-host|colo-port|colo-export|active-disk|hidden-disk)=[^,]*,?)", _Scan.ignore),
        (r"(trusted,?)", _flag("trusted", True)),
        (r"(untrusted,?)", _flag("trusted", False)),
        (r"(target=.*)", _string("target")),
        (r"([a-z][-a-z0-9]*=[^,],?)", _Scan.unknown),
        (r"((?:raw|qcow2?|vhd):).*", _Scan.format_prefix),
        (r"((?:iscsi|e?nbd|drbd):).*", _Scan.script_prefix),
        (r"((?:tapdisk|tap2?|aio|ioemu|file|phy):).*", _Scan.prefix),
        (r"([a-z][a-z0-9]*:)(?:[^a-z0-9].*)?", _Scan.unknown_prefix),
        (r"([^=,]*,|[^=,]+,?)", _Scan.positional),
    )
)
