"""The client of chaosd: ``from chaos.client import Chaos``.

::

    with Chaos() as chaos:
        made = chaos.create("app.cfg", name="fw-1", wait_ready=5)
        for event in chaos.events():
            ...
        chaos.destroy_all(progress=lambda step: print(step["what"], step["done"], step["total"]))

Many requests may be in flight at once: ``submit`` begins one, ``call`` waits for it. Several
threads may share a Chaos. docs/protocol.md has the methods, their parameters and values.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from chaos.connection import SOCKET, Connection, Pending
from xenctypes.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from typing import Self

    from chaos.usage import Look

__all__ = ["SOCKET", "Chaos", "Console", "Pending"]

WRITE_MAX = 1 << 16

Table = dict[str, Any]
Tables = list[Table]
Progress = Callable[[Table], object]


class Chaos(Connection):
    """A connection to chaosd, a context manager. NoDaemon, PermissionDenied.

    ``path`` is its socket, by default $CHAOS_SOCKET or SOCKET. Domains are given by name, domid
    or UUID, as texts. Every method raises what the daemon says went wrong, of its class in
    xenctypes.errors, and ProtocolError when the connection is lost. A ``progress`` is called
    with {"what", "done", "total"} for each thing that is done.
    """

    def create(
        self,
        path: str | bytes | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
        *,
        config: str | bytes | None = None,
        name: str | None = None,
        paused: bool = False,
        wait_ready: float = 0,
        progress: Progress | None = None,
    ) -> Table:
        """Create a domain from an xl.cfg file, or from ``config``, the text of one.

        ``wait_ready`` is how many seconds to wait for its ready event, 0 not to. The value has
        "name", "domid", "uuid", "ready_ms" and what else ``chaos create --json`` shows.
        ``progress`` hears of the steps, if no shell is ready for it.
        """
        params: Table = {"overrides": [*overrides], "paused": paused, "wait_ready": wait_ready}
        if path is not None:
            params["path"] = os.fsencode(os.path.abspath(path))
        if config is not None:
            params |= {"config": config, "directory": os.getcwd()}
        if name is not None:
            if any(char in '"\\' or char < " " for char in name):
                raise ConfigError(f"{name!r} is no name for a domain", key="name")
            params["overrides"].append(f'name="{name}"')
        made: Table = self._watched("create", progress, **params)
        return made

    def list(self, *domains: str) -> Tables:
        """Domains, all if none are named, as ``chaos list --json`` has them."""
        return self._tables("list", domains=[*domains])

    def usage(self) -> Look:
        """What each domain has used so far, as ``chaos top`` shows it, without rates."""
        from chaos.usage import Look, Usage

        seen = self.call("usage")
        return Look(seen["at"], [Usage(**one) for one in seen["domains"]])

    def destroy(
        self, *domains: str, force: bool = False, progress: Progress | None = None
    ) -> Tables:
        """End domains; name, domid and uuid of each. ``force``: other toolstacks' too."""
        params: Table = {"domains": [*domains], "force": force}
        found: Tables = self._watched("destroy", progress, **params)
        return found

    def destroy_all(self, *, progress: Progress | None = None) -> Tables:
        """End every domain that chaos made; name, domid and uuid of each."""
        found: Tables = self._watched("destroy", progress, all=True)
        return found

    def shutdown(
        self,
        *domains: str,
        wait: bool = False,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> Tables | None:
        """Ask domains to power off. With ``wait`` until they have, ``timeout`` seconds at most."""
        params: Table = {"domains": [*domains], "wait": wait, **_limit(timeout)}
        found: Tables | None = self._watched("shutdown", progress, **params)
        return found

    def reboot(
        self,
        *domains: str,
        wait: bool = False,
        timeout: float | None = None,
        progress: Progress | None = None,
    ) -> Tables | None:
        """Ask domains to reboot. ``wait`` and ``timeout`` as for ``shutdown``."""
        params: Table = {"domains": [*domains], "wait": wait, **_limit(timeout)}
        found: Tables | None = self._watched("reboot", progress, **params)
        return found

    def pause(self, domain: str) -> Table:
        """Stop a domain from running: its name, domid and uuid."""
        return self._table("pause", domain=domain)

    def unpause(self, domain: str) -> Table:
        """Let a paused domain run: its name, domid and uuid."""
        return self._table("unpause", domain=domain)

    def rename(self, domain: str, name: str) -> Table:
        """Give a domain another name: its name, domid and uuid."""
        return self._table("rename", domain=domain, name=name)

    def wait(self, domain: str, *, dead: bool = False, timeout: float | None = None) -> Table:
        """Wait until a domain is ready, or dead: "outcome" is "ready", "dead" or "timeout"."""
        return self._table("wait", domain=domain, dead=dead, **_limit(timeout))

    def logs(self, domain: str) -> bytes:
        """What its console has shown, as far as it is kept."""
        return bytes(self.call("logs", domain=domain))

    def console(self, domain: str) -> Console:
        """Attach to a domain's console."""
        return Console(self, domain)

    def events(self, token: str | None = None) -> Generator[Table, None, None]:
        """Events as they come; with a token first those since then, with "" all that are kept.

        The subscription ends with the iterator.
        """
        pending = self.submit("events", token=token)
        try:
            yield from pending.progress
        finally:
            pending.cancel()

    def info(self) -> Table:
        """Information on the host, as ``chaos info --json`` has it."""
        return self._table("info")

    def version(self) -> Table:
        """The daemon's "version", its "protocol" and its "pid"."""
        return self._table("version")

    # The pool

    def pool_list(self) -> Tables:
        """The flavours."""
        return self._tables("pool.list")

    def pool_add(self, **flavour: Any) -> Table:
        """Add a flavour, of the settings that chaos.toml(5) has for one."""
        return self._table("pool.add", flavour=flavour)

    def pool_resize(self, name: str, size: int, low: int | None = None) -> Table:
        """Have a flavour hold ``size`` shells; ``low`` is its low-water mark."""
        mark = {} if low is None else {"low": low}
        return self._table("pool.resize", name=name, size=size, **mark)

    def pool_wait(self, *names: str, progress: Progress | None = None) -> Tables:
        """Wait until flavours, all if none are named, have their shells. StateError if they can't.

        The value is as of ``pool_list``.
        """
        found: Tables = self._watched("pool.wait", progress, names=[*names])
        return found

    def pool_drain(self, name: str, *, progress: Progress | None = None) -> int:
        """Give a flavour's shells back; how many there were."""
        return int(self._watched("pool.drain", progress, name=name)["shells"])

    def pool_remove(self, name: str, *, progress: Progress | None = None) -> None:
        """Give a flavour up, and its shells back."""
        self._watched("pool.remove", progress, name=name)

    def _watched(self, method: str, progress: Progress | None, **params: Any) -> Any:
        """Call a method that reports progress; what ``progress`` raises ends it."""
        if progress is None:
            return self.call(method, **params)
        pending = self.submit(method, progress=True, **params)
        try:
            for each in pending.progress:
                progress(each)
        except BaseException:
            pending.cancel()
            raise
        return pending.result()

    def _table(self, method: str, **params: Any) -> Table:
        value: Table = self.call(method, **params)
        return value

    def _tables(self, method: str, **params: Any) -> Tables:
        value: Tables = self.call(method, **params)
        return value


class Console:
    """A guest's console, a context manager: iterate over its output, ``write`` its input."""

    def __init__(self, chaos: Chaos, domain: str) -> None:
        self._chaos = chaos
        self._pending = chaos.submit("console.attach", domain=domain)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[bytes]:
        """What the guest has written, then what it writes, until it is dead."""
        return self._pending.progress

    def write(self, data: bytes) -> None:
        """Type; returns when the guest's ring has taken it all."""
        for start in range(0, len(data), WRITE_MAX):
            piece = data[start : start + WRITE_MAX]
            self._chaos.call("console.write", id=self._pending.ident, data=piece)

    def close(self) -> None:
        """Detach. Idempotent."""
        self._pending.cancel()


def _limit(timeout: float | None) -> Table:
    return {} if timeout is None else {"timeout": timeout}
