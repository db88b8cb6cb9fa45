"""Restarts that are under way: a dead domain's successor, on disk until it runs.

::

    /run/chaos/restarts/<uuid>.json     written before the dead domain is taken away

A daemon that is killed in between finds the file when it starts, and goes on. Whoever removes the
file calls the restart off: ``chaos destroy`` does, with a daemon and without.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chaos.configjson import from_dict
from chaos.domains import as_uuid
from xenctypes.errors import ChaosError, StateError

if TYPE_CHECKING:
    from chaos.domconfig import DomainConfig
    from chaos.registry import Registry

SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Restart:
    """``config`` is what the successor is made from, ``failures`` how often in a row it died.

    ``domid`` is that of the dead domain, ``owner`` as in its record.
    """

    uuid: str
    config: DomainConfig
    failures: int
    domid: int = -1
    owner: dict[str, Any] | None = None

    def describe(self) -> dict[str, Any]:
        """As ``chaos destroy --json`` tells of one that it called off."""
        return {"name": self.config.name, "domid": None, "uuid": self.uuid}


class Restarts:
    """The files. Names and records are the registry's."""

    def __init__(self, names: Registry) -> None:
        self._directory = f"{names.path}/restarts"

    def write(self, restart: Restart) -> None:
        """Keep a restart; StateError if that cannot be."""
        values = {
            "failures": restart.failures,
            "domid": restart.domid,
            "owner": restart.owner,
            "config": restart.config.as_dict(),
        }
        path = self._path(restart.uuid)
        try:
            os.makedirs(self._directory, 0o700, exist_ok=True)
            with open(f"{path}.new", "w", encoding="utf-8") as file:
                json.dump(values, file)
            os.rename(f"{path}.new", path)
        except OSError as error:
            raise StateError(f"cannot write {path}: {error.strerror}") from error

    def holds(self, uuid: str) -> bool:
        """Whether a restart is still wanted."""
        return os.path.exists(self._path(uuid))

    def drop(self, uuid: str) -> bool:
        """Forget a restart; whether there was one."""
        try:
            os.unlink(self._path(uuid))
        except FileNotFoundError:
            return False
        return True

    def all(self) -> list[Restart]:
        """Those that are under way; what cannot be read is dropped."""
        found = []
        for uuid in self._uuids():
            try:
                with open(self._path(uuid), "rb") as file:
                    values = json.load(file)
                config, failures = from_dict(values["config"]), int(values["failures"])
                domid, owner = int(values.get("domid", -1)), values.get("owner")
                found.append(Restart(uuid, config, failures, domid, owner))
            except FileNotFoundError:
                continue
            except (ValueError, KeyError, TypeError, ChaosError):
                self.drop(uuid)
        return found

    def sweep(self) -> None:
        """Remove what a writer left that was killed; there is one writer, the daemon."""
        with suppress(FileNotFoundError):
            for name in os.listdir(self._directory):
                if not name.endswith(SUFFIX):
                    os.unlink(f"{self._directory}/{name}")

    def call_off(self, wanted: str | None = None) -> list[Restart]:
        """Drop the restarts of a name or UUID, or all of them; those that were dropped."""
        wanted = wanted and (as_uuid(wanted) or wanted)
        return [
            restart
            for restart in self.all()
            if wanted in {None, restart.uuid, restart.config.name} and self.drop(restart.uuid)
        ]

    def call_off_of(self, domid: str) -> list[Restart]:
        """The same by the number that the dead domain had, if no other domain has it by now."""
        return [
            restart
            for restart in self.all()
            if str(restart.domid) == domid and self.drop(restart.uuid)
        ]

    def _uuids(self) -> list[str]:
        with suppress(FileNotFoundError):
            return [
                name.removesuffix(SUFFIX)
                for name in os.listdir(self._directory)
                if name.endswith(SUFFIX)
            ]
        return []

    def _path(self, uuid: str) -> str:
        return f"{self._directory}/{uuid}{SUFFIX}"
