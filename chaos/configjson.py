"""DomainConfig.as_dict read back: for requests and state files.  Pure.

What comes in is checked like a configuration file: names, types, and every value, since the tree
checks itself.  Nothing but ConfigError is raised.
"""

from __future__ import annotations

from base64 import b64decode
from binascii import Error as Base64Error
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from chaos.cpuspec import parse_cpus
from chaos.diskspec import DiskConfig
from chaos.domconfig import DISKS_MAX, VCPUS_MAX, VIFS_MAX, DomainConfig
from chaos.netspec import VLAN_MAX, RateLimit, VlanConfig, parse_mac
from chaos.vifspec import VifConfig, read_gateway, read_ip
from chaos.xldoc import quote
from xenctypes.errors import ConfigError

T = TypeVar("T")


def from_dict(data: object) -> DomainConfig:
    """The configuration that ``as_dict`` told of; names that are left out have their defaults."""
    taken = _Taken(data, "configuration")
    values: dict[str, Any] = {
        "affinity": tuple(
            parse_cpus(text) for text in taken.many("cpus", str, max(VCPUS_MAX.values()))
        ),
        "vifs": tuple(_vif(vif) for vif in taken.many("vif", dict, VIFS_MAX)),
        "disks": tuple(_disk(disk) for disk in taken.many("disk", dict, DISKS_MAX)),
        "metadata": _base64(taken.one("noxs_metadata", str, "")),
        "metadata_file": taken.one("noxs_metadata_file", str, ""),
        "uuid": _uuid(taken.one("uuid", str, "")),
        **taken.rest(DomainConfig),
    }
    return DomainConfig(**values)


class _Taken:
    """A mapping from outside, taken apart key by key."""

    def __init__(self, data: object, what: str) -> None:
        if type(data) is not dict:
            raise ConfigError(f"the {what} is no mapping")
        self.left: dict[object, object] = dict(data)
        self.what = what

    def one(self, key: str, kind: type[T], default: Any) -> Any:
        """A value of exactly that type; None and nothing stand for the default."""
        value = self.left.pop(key, None)
        if value is not None and type(value) is not kind:
            raise ConfigError(f"{key} of the {self.what} is no {kind.__name__}", key=key)
        return default if value is None else value

    def many(self, key: str, kind: type[T], most: int) -> list[T]:
        """A list of values of that type."""
        items = self.one(key, list, [])
        if len(items) > most or any(type(item) is not kind for item in items):
            cause = f"{key} of the {self.what} is no list of at most {most} {kind.__name__}"
            raise ConfigError(cause, key=key)
        return list(items)

    def rest(self, tree: type[Any]) -> dict[str, Any]:
        """What is left, by the plain fields of a dataclass; anything else is an error."""
        found = {}
        for field in fields(tree):
            kind = _PLAIN.get(str(field.type))
            if kind is not None and field.name in self.left:
                found[field.name] = self.one(field.name, kind, None)
            needed = field.default is MISSING is field.default_factory and kind is not None
            if needed and found.get(field.name) is None:
                raise ConfigError(f"the {self.what} has no {field.name}", key=field.name)
        if self.left:
            key = quote(str(next(iter(self.left))))
            raise ConfigError(f"the {self.what} has an unknown key {key}")
        return {key: value for key, value in found.items() if value is not None}


_PLAIN: dict[str, type] = {"str": str, "int": int, "bool": bool}


def _vif(data: object) -> VifConfig:
    taken = _Taken(data, "vif")
    mac = taken.one("mac", str, "")
    rate, vlan = taken.one("rate", dict, None), taken.one("vlan", dict, None)
    values: dict[str, Any] = {
        "mac": parse_mac(mac) if mac else None,
        "rate": None if rate is None else RateLimit(**_Taken(rate, "rate").rest(RateLimit)),
        "vlan": None if vlan is None else _vlan(vlan),
        **read_ip(taken.one("ip", str, "")),
        **read_gateway(taken.one("gateway", str, "")),
        **taken.rest(VifConfig),
    }
    return VifConfig(**values)


def _vlan(data: object) -> VlanConfig:
    taken = _Taken(data, "vlan")
    untagged, tagged = (tuple(taken.many(key, int, VLAN_MAX)) for key in ("untagged", "tagged"))
    return VlanConfig(untagged=untagged, tagged=tagged, **taken.rest(VlanConfig))


def _disk(data: object) -> DiskConfig:
    taken = _Taken(data, "disk")
    discard = taken.one("discard", bool, None)
    return DiskConfig(discard=discard, **taken.rest(DiskConfig))


def _base64(text: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except (Base64Error, ValueError):
        raise ConfigError("the metadata is not base64", key="noxs_metadata") from None


def _uuid(text: str) -> bytes | None:
    if not text:
        return None
    try:
        return bytes.fromhex(text.replace("-", ""))
    except ValueError:
        raise ConfigError(f"{quote(text)} is no UUID", key="uuid") from None
