"""list: the domains of this host in xl's six columns, or as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chaos.domains import find, list_domains, shutdown_name

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from chaos.domains import Domain
    from chaos.invocation import Invocation

HEADER = "Name                                        ID   Mem VCPUs\tState\tTime(s)"


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("domains", nargs="*", metavar="DOMAIN", help="only these")
    parser.add_argument(
        "-l", "--long", "--json", action="store_true", help="everything that is known, as JSON"
    )
    parser.add_argument(
        "--shells", action="store_true", help="also the domains that wait in chaosd's pool"
    )
    parser.add_argument("--names", action="store_true", help="only the names, one a line")
    parser.add_argument(
        "--uuid", action="store_true", help="add a column with the UUID, as xl list -v does"
    )


def run(call: Invocation) -> int:
    """Print the list."""
    args = call.args
    if args.domains:
        domains = [find(call.host, call.names, wanted) for wanted in args.domains]
    else:
        problems: list[str] = []
        domains = list_domains(call.host, call.names, problems, shells=args.shells)
        for problem in problems:
            call.warn(problem)
    if args.long:
        call.print_json([_describe(domain) for domain in domains])
        return 0
    if args.names:
        call.print(*(domain.name for domain in domains))
        return 0
    call.print(HEADER + ("   UUID" if args.uuid else ""))
    for domain in domains:
        call.print(_row(domain) + (f" {domain.uuid}" if args.uuid else ""))
    return 0


def _row(domain: Domain) -> str:
    info = domain.info
    return (
        f"{domain.name:<40} {domain.domid:5} {domain.memory_mib:5} {info.nr_online_vcpus:5}"
        f"     {domain.state}  {info.cpu_time / 1e9:8.1f}"
    )


def _describe(domain: Domain) -> dict[str, Any]:
    info, record = domain.info, domain.record
    return {
        "name": domain.name,
        "domid": domain.domid,
        "uuid": domain.uuid,
        "state": domain.state,
        "shutdown_reason": shutdown_name(info) if info.shutdown else None,
        "memory_mib": domain.memory_mib,
        "vcpus": info.nr_online_vcpus,
        "cpu_seconds": info.cpu_time / 1e9,
        "made_by_chaos": record is not None,
        "noxs": record.noxs if record else None,
        "created": record.created if record else None,
        "ready_ms": record.ready_ms if record else None,
        "config": record.config if record else None,
    }
