"""chaos.toml: what chaosd is told at its start.  Pure but for ``read``.

SETTINGS and FLAVOUR_SETTINGS are the file's whole vocabulary; chaos.toml(5) is made from them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from chaos.domconfig import LIMITS, DomainConfig, check_name
from chaos.vifspec import parse_vif
from noxs.abi import MAX_METADATA
from xenctypes.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

PATH = "/etc/chaos/chaos.toml"
SIZE_MAX = 1 << 20
FLAVOURS_MAX = 256


class Setting(NamedTuple):
    """One key: in which table it stands, its type, its default, its bounds, what it says."""

    section: str
    key: str
    kind: type
    default: Any
    doc: str
    low: int = 0
    high: int = 1 << 31


SETTINGS = (
    Setting("daemon", "builders", int, 2, "Processes that make shells.", 1, 64),
    Setting("daemon", "group", str, "chaos", "The group that may use the socket."),
    Setting("daemon", "clients", int, 256, "Connections at once.", 1, 4096),
    Setting("daemon", "requests", int, 64, "Requests in flight for each connection.", 1, 1024),
    Setting("pool", "max_shells", int, 1000, "Shells of all flavours together.", 0, 32000),
    Setting("pool", "max_memory", int, 4096, "MiB that all shells together may hold."),
    Setting(
        "pool", "memory_floor", int, 64,
        "MiB of free Xen memory below which shells are given back.",
    ),
    Setting(
        "pool", "adaptive", bool, True,
        "Whether a shape that is asked for again and again gets shells of its own.",
    ),
    Setting("pool", "adaptive_size", int, 4, "Shells of each such flavour.", 1, 1000),
    Setting(
        "pool", "adaptive_seconds", int, 600,
        "Seconds without a request after which such a flavour goes.", 1,
    ),
)  # fmt: skip
FLAVOUR_SETTINGS = (
    Setting("flavour", "name", str, "", "Its name, for chaos pool."),
    Setting("flavour", "type", str, "pv", "As in xl.cfg."),
    Setting("flavour", "memory", int, 0, "MiB, as in xl.cfg."),
    Setting("flavour", "maxmem", int, 0, "MiB, as in xl.cfg."),
    Setting("flavour", "vcpus", int, 1, "As in xl.cfg."),
    Setting("flavour", "maxvcpus", int, 0, "As in xl.cfg."),
    Setting("flavour", "vif", list, (), "As in xl.cfg, without mac, ip and gateway."),
    *(
        Setting("flavour", key, int, default, "As in xl.cfg.", low, high)
        for key, (default, low, high) in LIMITS.items()
    ),
    Setting(
        "flavour", "metadata", int, 0,
        "Bytes of noxs_metadata that guests may be given, beyond what fits into the first page.",
        0, MAX_METADATA,
    ),
    Setting("flavour", "kernel", str, "", "An image: with it the flavour's shells are warm."),
    Setting("flavour", "ramdisk", str, "", "A ramdisk for the image."),
    Setting("flavour", "cmdline", str, "", "The image's command line."),
    Setting("flavour", "size", int, 8, "Shells to hold ready.", 0, 32000),
    Setting(
        "flavour", "low", int, 0,
        "With fewer than this a refill waits for no quiet moment; 0: a quarter of size.",
        0, 32000,
    ),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FlavourSpec:
    """A flavour as configured: ``config`` is the blank configuration that all its shells have."""

    name: str
    config: DomainConfig
    size: int = 8
    low: int = 0
    metadata: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that chaos.toml says. Fields as in SETTINGS."""

    builders: int = 2
    group: str = "chaos"
    clients: int = 256
    requests: int = 64
    max_shells: int = 1000
    max_memory: int = 4096
    memory_floor: int = 64
    adaptive: bool = True
    adaptive_size: int = 4
    adaptive_seconds: int = 600
    flavours: tuple[FlavourSpec, ...] = field(default=())


def read(path: str) -> Settings:
    """The settings in a file. ConfigError."""
    import tomllib

    try:
        with open(path, "rb") as file:
            text = file.read(SIZE_MAX + 1)
        if len(text) > SIZE_MAX:
            raise ConfigError(f"longer than {SIZE_MAX} bytes", filename=path)
        data = tomllib.loads(text.decode())
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"cannot read it: {reason}", filename=path) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not TOML: {error}", filename=path) from error
    try:
        return from_data(data)
    except ConfigError as error:
        raise ConfigError(error.cause, hint=error.hint, key=error.key, filename=path) from None


def from_data(data: dict[str, Any]) -> Settings:
    """The settings in a TOML document. ConfigError."""
    values: dict[str, Any] = {}
    for section, table in data.items():
        if section == "flavour":
            continue
        if section not in {"daemon", "pool"}:
            raise _unknown(f"table [{section}]", section, ("daemon", "pool", "flavour"))
        values |= _table(section, table, [s for s in SETTINGS if s.section == section])
    flavours = data.get("flavour", [])
    if not isinstance(flavours, list) or len(flavours) > FLAVOURS_MAX:
        raise ConfigError(f"[[flavour]] is a list of tables, at most {FLAVOURS_MAX}", key="flavour")
    specs = tuple(flavour(table) for table in flavours)
    names = [spec.name for spec in specs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f'two flavours are named "{name}"', key="flavour")
    return Settings(**values, flavours=specs)


def flavour(table: object) -> FlavourSpec:
    """A flavour from a [[flavour]] table, or from a request of that form. ConfigError."""
    values = _table("flavour", table, FLAVOUR_SETTINGS)
    name = values.pop("name", "")
    if not name:
        raise ConfigError("a flavour has no name", key="name")
    spec = {key: values.pop(key) for key in ("size", "low", "metadata") if key in values}
    try:
        check_name(name)
        return FlavourSpec(name=name, config=_blank(name, values), **spec)
    except ConfigError as error:
        raise ConfigError(
            f'flavour "{name}": {error.cause}', hint=error.hint, key=error.key
        ) from None


def _blank(name: str, values: dict[str, Any]) -> DomainConfig:
    """The configuration of a flavour's shells."""
    if not values.get("memory"):
        raise ConfigError("memory is not set", key="memory")
    vifs = []
    for devid, text in enumerate(values.pop("vif", [])):
        if not isinstance(text, str):
            raise ConfigError("a vif is a text, as in xl.cfg", key="vif")
        vif, _ = parse_vif(text, devid)
        if vif.mac or vif.ipv4 or vif.ipv6 or vif.gateway4 or vif.gateway6 or vif.vifname:
            cause = "mac, ip, gateway and vifname belong to a guest, not to a flavour"
            raise ConfigError(cause, key="vif")
        vifs.append(vif)
    return DomainConfig(name=name, vifs=tuple(vifs), **values)


def _table(section: str, table: Any, settings: Iterable[Setting]) -> dict[str, Any]:
    known = {setting.key: setting for setting in settings}
    if not isinstance(table, dict):
        raise ConfigError(f"{section} is no table", key=section)
    values: dict[str, Any] = table
    for key, value in values.items():
        setting = known.get(key)
        if setting is None:
            raise _unknown(f"{key} in [{section}]", key, known)
        if type(value) is not setting.kind:
            raise ConfigError(
                f"{key} in [{section}] is a {_name(type(value))}, not a {_name(setting.kind)}",
                key=key,
            )
        if isinstance(value, int) and not setting.low <= value <= setting.high:
            raise ConfigError(
                f"{key} {value} is not within {setting.low} to {setting.high}", key=key
            )
    return dict(values)


def _name(kind: type) -> str:
    return {int: "number", str: "text", bool: "truth value", list: "list"}.get(kind, kind.__name__)


def _unknown(what: str, key: str, known: Iterable[str]) -> ConfigError:
    close = get_close_matches(str(key), list(known), n=1)
    return ConfigError(
        f"unknown {what}", hint=f"did you mean {close[0]}?" if close else "", key=key
    )
