"""Domains by name, domid or UUID: the hypervisor's list joined with our records."""

from __future__ import annotations

import contextlib
import uuid as uuid_module
from typing import TYPE_CHECKING, NamedTuple

from chaos import registry, xenstored
from chaos.destroy import end, pooled, strip
from xenctypes.errors import BusError, ChaosError, StateError

if TYPE_CHECKING:
    from collections.abc import Container

    from chaos.host import Host
    from chaos.registry import Entry, Record, Registry
    from xenctypes.ctrl import DomainInfo

DOM0 = "Domain-0"
SHELL_NAME = "(shell)"
UNNAMED = "(null)"  # what xl calls a domain whose name it does not know
SHUTDOWN_LETTERS = "-rscwS"  # poweroff, reboot, suspend, crash, watchdog, soft reset (xl_info.c)
SHUTDOWN_NAMES = ("poweroff", "reboot", "suspend", "crash", "watchdog", "soft-reset")


class Domain(NamedTuple):
    """One domain as the hypervisor has it, with what we remember of it."""

    info: DomainInfo
    name: str
    record: Record | None

    @property
    def domid(self) -> int:
        """The hypervisor's number for it."""
        return self.info.domid

    @property
    def uuid(self) -> str:
        """The UUID that the hypervisor stores, as text."""
        return str(uuid_module.UUID(bytes=self.info.uuid))

    @property
    def is_shell(self) -> bool:
        """Whether it waits in a daemon's pool."""
        return self.record is not None and self.record.state == registry.SHELL

    @property
    def memory_mib(self) -> int:
        """Memory in MiB, with what is claimed and not yet populated, as xl counts it."""
        return (self.info.tot_pages + self.info.outstanding_pages) >> 8

    @property
    def state(self) -> str:
        """The six letters of xl's State column."""
        info = self.info
        reason = shutdown_letter(info)
        return "".join(
            letter if flag else "-"
            for letter, flag in (
                ("r", info.running),
                ("b", info.blocked),
                ("p", info.paused),
                ("s", info.shutdown),
                (reason, info.shutdown),
                ("d", info.dying),
            )
        )


def shutdown_letter(info: DomainInfo) -> str:
    """The letter of xl for why it shut down: "-" for a plain poweroff, "?" for a new reason."""
    reason = info.shutdown_reason or 0
    return SHUTDOWN_LETTERS[reason] if 0 <= reason < len(SHUTDOWN_LETTERS) else "?"


def shutdown_name(info: DomainInfo) -> str:
    """Why a domain shut down, as a word (SHUTDOWN_* of xen/sched.h)."""
    reason = info.shutdown_reason or 0
    return SHUTDOWN_NAMES[reason] if 0 <= reason < len(SHUTDOWN_NAMES) else f"reason {reason}"


def list_domains(
    host: Host, names: Registry, problems: list[str] | None = None, *, shells: bool = False
) -> list[Domain]:
    """Every domain, by domid; reaps first what dead commands left behind.

    A line for each thing that could not be reaped is appended to ``problems``. The shells of a
    daemon's pool are left out but with ``shells``.
    """
    infos = host.ctrl.domain_list()
    if reap(host, names, infos, [] if problems is None else problems):
        infos = host.ctrl.domain_list()
    domains = [_join(host, names, info) for info in infos]
    return [
        domain
        for domain in domains
        if (shells or not domain.is_shell) and (domain.name != UNNAMED or _still_is(host, domain))
    ]


def _still_is(host: Host, domain: Domain) -> bool:
    """Whether a domain that has no name was not destroyed, with its record, while we looked."""
    info = host.ctrl.domain_info(domain.domid)
    return info is not None and info.uuid == domain.info.uuid


def find(host: Host, names: Registry, wanted: str) -> Domain:
    """The domain that ``wanted`` names: a domid, a name or a UUID. Raises StateError."""
    info = None
    if wanted.isascii() and wanted.isdigit():
        info = host.ctrl.domain_info(int(wanted)) if len(wanted) < 6 else None
    elif wanted == DOM0:
        info = host.ctrl.domain_info(0)
    else:
        uuid = names.uuid_of(wanted) or as_uuid(wanted)
        if uuid is not None:
            info = _by_uuid(host, names, uuid)
        else:
            info = _by_name_on_bus(host, names, wanted)
    if info is None:
        reap(host, names, host.ctrl.domain_list(), [])  # its name may be all that is left of it
        raise StateError(f'no domain "{wanted}"', hint="chaos list shows what runs")
    return _join(host, names, info)


def owned(host: Host, names: Registry, wanted: str) -> tuple[Domain, Record]:
    """Like find, but only a domain that chaos made and finished: others raise StateError."""
    domain = find(host, names, wanted)
    if domain.record is None:
        raise StateError(
            f'domain "{wanted}" was not made by chaos', hint="use the toolstack that made it"
        )
    if domain.is_shell:
        raise pooled(domain.domid)
    if domain.record.state != registry.RUNNING:
        raise StateError(unfinished(domain.record), hint="try again")
    return domain, domain.record


def living(domain: Domain) -> None:
    """Raise StateError if a domain has shut down."""
    if domain.info.shutdown or domain.info.dying:
        raise StateError(f'domain "{domain.name}" is dead', hint="chaos list shows how it ended")


def unfinished(record: Record) -> str:
    """What an error says of a domain that is on its way into the world, or out of it."""
    doing = "destroyed" if record.state == registry.ENDING else "created"
    return f'domain "{record.name}" is still being {doing}'


def reap(
    host: Host,
    names: Registry,
    infos: list[DomainInfo],
    problems: list[str],
    *,
    shells: bool = False,
) -> int:
    """Destroy domains that a killed create left half built, and drop records without a domain.

    Returns how many were reaped, and appends a line for each that resisted. Whatever is locked
    belongs to somebody alive and is left, and so are a daemon's shells, but when the daemon
    itself asks for ``shells`` at its start.
    """
    alive = {str(uuid_module.UUID(bytes=info.uuid)) for info in infos}
    dying = {str(uuid_module.UUID(bytes=info.uuid)) for info in infos if info.dying}
    suspects = []
    daemon = not shells and names.daemon_runs()
    for uuid in names.uuids():
        try:
            record = names.read(uuid)
        except StateError as error:
            problems.append(f"domain {uuid}: {error}")
            continue
        if record is not None and record.state == registry.SHELL and daemon:
            continue
        as_it_should = record and (record.state, record.uuid) == (registry.RUNNING, uuid)
        held = record is not None and uuid in dying and _is_held(record)
        if not as_it_should or uuid not in alive or held:
            suspects.append(uuid)
    if not suspects and not names.has_stale_staging():
        return 0
    with names.locked():
        names.sweep()
    reaped = 0
    for uuid in suspects:
        try:
            reaped += reap_one(host, names, uuid, shells=shells)
        except ChaosError as error:
            problems.append(f"what is left of domain {uuid} cannot be removed: {error}")
    return reaped


def reap_one(host: Host, names: Registry, uuid: str, *, shells: bool = False) -> int:
    """Reap one, unless it is finished and alive or somebody holds it; how many were.

    A running daemon holds its shells, but for when it asks for them with ``shells``.
    """
    with names.entry(uuid) as entry:
        try:
            if not entry.lock(wait=False):
                return 0
        except StateError:
            return 0
        record = names.read(uuid)
        shell = record is not None and record.state == registry.SHELL
        if shell and not shells and names.daemon_runs():
            return 0
        record = record or registry.Record(uuid=uuid, name="")
        either = {uuid_module.UUID(uuid).bytes, uuid_module.UUID(record.uuid).bytes}
        info = _any_of(host, either)
        zombie = info is not None and info.dying and _is_held(record)
        if record.state == registry.RUNNING and info is not None and not zombie:
            entry.close()  # the registry's lock comes before it
            if record.uuid != uuid:
                _settle_again(host, names, uuid)
            return 0
        if info is not None:
            end(host, info, record)
        elif record.domid > 0 and host.ctrl.domain_info(record.domid) is None:
            for take in strip(host, record.domid, record):
                take()
        names.forget(entry, record)
        return 1


def _is_held(record: Record) -> bool:
    """Whether a backend or a store may map pages of the domain.

    One that another toolstack destroyed goes only when they let go.
    """
    return bool(record.macs or record.disks or record.store)


def settle(host: Host, names: Registry, entry: Entry, record: Record) -> None:
    """Give a domain the UUID and the name that its record says. The caller holds both locks.

    Also if that was done in part, by a process that was killed. Raises CallFailed.
    """
    host.ctrl.domain_sethandle(record.domid, uuid_module.UUID(record.uuid).bytes)
    names.finish_rekey(entry, record)
    with contextlib.suppress(BusError):  # xl shows its old name then
        xenstored.announce(host, record.domid, record.name)


def _settle_again(host: Host, names: Registry, uuid: str) -> None:
    with names.locked(), names.entry(uuid) as entry, contextlib.suppress(StateError):
        if entry.lock(wait=False):
            record = names.read(uuid)
            if record is not None and record.uuid != uuid:
                settle(host, names, entry, record)


def check_free(host: Host, names: Registry, name: str) -> None:
    """Raise StateError if a domain of that name exists; what died with the name is reaped."""
    if names.uuid_of(name) is None:
        return
    reap(host, names, host.ctrl.domain_list(), [])
    owner = names.uuid_of(name)
    if owner is not None and names.read(owner) is not None:
        raise registry.name_taken(name)


def _join(host: Host, names: Registry, info: DomainInfo) -> Domain:
    if info.domid == 0:
        return Domain(info, DOM0, None)
    try:
        record = names.read(str(uuid_module.UUID(bytes=info.uuid)))
    except StateError:
        record = None  # damaged: reap tells of it
    if record is not None:
        name = SHELL_NAME if record.state == registry.SHELL else record.name
        return Domain(info, name, record)
    return Domain(info, _name_on_bus(host, info.domid) or UNNAMED, None)


def _name_on_bus(host: Host, domid: int) -> str | None:
    """The name that another toolstack gave a domain, where there is a bus that has it."""
    try:
        return host.bus.get(f"/local/domain/{domid}/name")
    except BusError:
        return None


def _by_uuid(host: Host, names: Registry, uuid: str) -> DomainInfo | None:
    wanted = uuid_module.UUID(uuid).bytes
    record = names.read(uuid)
    if record is not None and record.domid >= 0:
        info = host.ctrl.domain_info(record.domid)
        if info is not None and info.uuid == wanted:
            return info
    return _any_of(host, {wanted})


def _any_of(host: Host, uuids: Container[bytes]) -> DomainInfo | None:
    """The first domain that has one of the UUIDs, looked for among all there are."""
    for domid, _, uuid in host.ctrl.domain_states():
        if uuid in uuids:
            info = host.ctrl.domain_info(domid)
            return info if info is not None and info.uuid in uuids else None
    return None


def _by_name_on_bus(host: Host, names: Registry, name: str) -> DomainInfo | None:
    for info in host.ctrl.domain_list():
        uuid = str(uuid_module.UUID(bytes=info.uuid))
        if info.domid and names.read(uuid) is None and _name_on_bus(host, info.domid) == name:
            return info
    return None


def as_uuid(text: str) -> str | None:
    """The UUID that a text is, in the usual notation, or None."""
    try:
        return str(uuid_module.UUID(text))
    except ValueError:
        return None
