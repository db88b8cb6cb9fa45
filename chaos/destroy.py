"""The end of a domain: every step is tried, so that one that fails keeps nothing else alive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chaos import registry, vif, xenstored
from xenctypes.errors import ChaosError, StateError

if TYPE_CHECKING:
    from chaos.domains import Domain
    from chaos.host import Host
    from chaos.registry import Record, Registry
    from xenctypes.ctrl import DomainInfo


def destroy(host: Host, names: Registry, domain: Domain, *, force: bool = False) -> None:
    """Destroy a domain and forget its name.

    Raises StateError for Domain-0, for a domain of another toolstack unless ``force``, and for
    one that another command is building; CallFailed if the hypervisor refuses.
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
        with names.locked():  # the daemon may be writing the record too
            if not entry.lock(wait=False):
                raise StateError(
                    f'domain "{domain.name}" is being created or destroyed by another command',
                    hint="wait for it",
                )
            record = names.read(domain.uuid) or registry.Record(domain.uuid, domain.name)
            record.state = registry.ENDING  # whoever finds it so, nobody at work on it, goes on
            entry.write(record)
        end(host, domain.info, record)
        names.forget(entry, record)


def end(host: Host, info: DomainInfo, record: Record) -> None:
    """Take a domain's devices away and destroy it. Raises the first failure, after trying all.

    The vifs go first: netback must not map pages of a domain that is gone, or it stays a zombie.
    """
    failure: ChaosError | None = None
    try:
        xenstored.withdraw(host, info.domid)  # the vifs' end takes an empty directory along
    except ChaosError as error:
        failure = error
    if record.macs:
        try:
            if not info.dying:
                host.ctrl.domain_pause(info.domid)
            vif.disconnect_all(host.bus, info.domid)
        except ChaosError as error:
            failure = failure or error
    if not info.dying:
        host.ctrl.domain_destroy(info.domid)
    if failure is not None:
        raise failure


def pooled(domid: int) -> StateError:
    """The error for a domain that is the pool's."""
    return StateError(
        f"domain {domid} is a shell of chaosd's pool", hint="chaos pool drain gives shells back"
    )
