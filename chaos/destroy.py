"""The end of a domain: every step is tried, so that one that fails keeps nothing else alive."""

from __future__ import annotations

import contextlib
import errno
from functools import partial
from typing import TYPE_CHECKING

from chaos import disk, registry, store, vif, xenstored
from xenctypes.errors import ChaosError, StateError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.domains import Domain
    from chaos.host import Host
    from chaos.registry import Entry, Record, Registry
    from xenctypes.ctrl import DomainInfo


def destroy(
    host: Host,
    names: Registry,
    domain: Domain,
    *,
    force: bool = False,
    wait: bool = False,
    ending: Callable[[Record], None] | None = None,
) -> None:
    """Destroy a domain and forget its name.

    Raises StateError for Domain-0, for a domain of another toolstack unless ``force``, and for
    one that another command is building or changing, unless ``wait``; CallFailed if the hypervisor
    refuses. Waits for whoever is destroying it already. ``ending`` is told what the domain was at
    its end, when nobody can change that any more.
    """
    if domain.domid == 0:
        raise StateError("Domain-0 is the host itself and cannot be destroyed")
    if domain.record is None:
        if domain.info.dying:
            raise StateError(
                f"domain {domain.domid} is dying already: somebody still maps its memory",
                hint="it goes when they let go",
            )
        if not force:
            raise StateError(
                f'domain "{domain.name}" ({domain.domid}) was not made by chaos',
                hint="use the toolstack that made it, or --force",
            )
        host.ctrl.domain_destroy(domain.domid)
        return
    if domain.record.state == registry.SHELL and names.daemon_runs():
        raise pooled(domain.domid)
    with names.entry(domain.uuid) as entry:
        record = _take(names, entry, domain, wait=wait)
        if record is not None:
            if ending is not None:
                ending(record)
            end(host, domain.info, record)
            names.forget(entry, record)


def _take(names: Registry, entry: Entry, domain: Domain, *, wait: bool) -> Record | None:
    """Lock a domain for its end and write that down; None if another has ended it.

    Its UUID may be another domain's since.
    """
    ended_by_another = False
    while True:
        with names.locked():  # the daemon may be writing the record too
            if ended_by_another and not names.has(domain.uuid):
                return None
            if entry.lock(wait=False):
                record = names.read(domain.uuid) or registry.Record(domain.uuid, domain.name)
                if _is_of_another(record, domain):
                    return None
                record.state = registry.ENDING  # whoever finds it so, nobody at work on it, goes on
                try:
                    entry.write(record)
                except OSError as error:
                    # Only a reaper needs the mark, and what destroys makes room.
                    if error.errno != errno.ENOSPC:
                        raise
                return record
            other = names.read(domain.uuid)
            if other is not None and _is_of_another(other, domain):
                return None
            if not wait and (other is None or other.state != registry.ENDING):
                raise StateError(
                    f'domain "{domain.name}" is being created or changed', hint="wait for it"
                )
        ended_by_another = True
        with contextlib.suppress(StateError):  # gone already
            entry.lock(wait=True)  # without the registry's, which whoever ends it needs
            entry.close()


def _is_of_another(record: Record, domain: Domain) -> bool:
    """Whether a record is not of this domain, but of one that has its UUID since."""
    if record.state == registry.SHELL:  # which may not say its domid
        return not domain.is_shell
    return record.domid > 0 and record.domid != domain.domid


def end(host: Host, info: DomainInfo, record: Record) -> None:
    """Take a domain's devices away and destroy it. Raises the first failure, after trying all.

    Devices and store go first: nobody must map pages of a domain that is gone, or it stays a
    zombie. The guest is not asked, for it may not answer.
    """
    failures: list[ChaosError] = []

    def attempt(function: Callable[[], object]) -> None:
        try:
            function()
        except ChaosError as error:
            failures.append(error)

    if (record.macs or record.disks or record.store) and not info.dying:
        attempt(lambda: host.ctrl.domain_pause(info.domid))
    for take in strip(host, info.domid, record):
        attempt(take)
    if not info.dying:
        host.ctrl.domain_destroy(info.domid)
    if record.store == store.PRIVATE and not failures:
        # A storesd that started in between has found the domain alive.
        attempt(lambda: store.release(host, record.store, info.domid, record.uuid))
    if failures:
        raise failures[0]


def strip(host: Host, domid: int, record: Record) -> list[Callable[[], object]]:
    """What takes a domain's store, its devices and its name for xl away, in this order.

    All of it can be done again, and without a domain. Each raises ChaosError.
    """
    release = partial(store.release, host, record.store, domid, record.uuid)
    # The devices' end takes an empty directory along.
    takings: list[Callable[[], object]] = [partial(xenstored.withdraw, host, domid)]
    if record.store == store.PRIVATE:
        takings.append(release)
    if record.macs:
        takings.append(lambda: vif.disconnect_all(host.bus, domid))
    if record.disks:
        takings.append(lambda: disk.disconnect_all(host.bus, domid))
    if record.store == store.SHARED:
        takings.append(release)
    return takings


def pooled(domid: int) -> StateError:
    """The error for a domain that is the pool's."""
    return StateError(
        f"domain {domid} is a shell of chaosd's pool", hint="chaos pool drain gives shells back"
    )
