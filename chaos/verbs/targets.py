"""mem-set, vcpu-set and sysrq: what a stock guest is told through its store."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from chaos import store
from chaos.create import SLACK_KIB
from chaos.domains import living, owned
from xenctypes.errors import ChaosError, StateError

if TYPE_CHECKING:
    from chaos.domains import Domain
    from chaos.host import Host
    from chaos.invocation import Invocation
    from chaos.registry import Record
    from noxs.nodes import Value

_MEMORY = re.compile(r"([0-9]{1,15})([bkmgt]?)b?\Z", re.IGNORECASE)
_UNITS = {"b": 0, "k": 10, "m": 20, "": 20, "g": 30, "t": 40}
MEMORY_MIN = 1 << 20


def kibibytes(text: str) -> int:
    """An amount of memory, in KiB: MiB unless it has a unit, as xl's parse_mem_size_kb()."""
    found = _MEMORY.match(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory, such as 256 or 1g")
    size = int(found[1]) << _UNITS[found[2].lower()]
    if size < MEMORY_MIN:
        raise argparse.ArgumentTypeError(f"{text} is less than 1 MiB")
    return size >> 10


def letter(text: str) -> str:
    """A key of the guest's SysRq."""
    if len(text) != 1 or not text.isascii() or not text.isalnum():
        raise argparse.ArgumentTypeError(f"{text} is not one letter or digit")
    return text


def configure(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options."""
    parser.add_argument("domain", metavar="DOMAIN", help="name, domid or UUID")
    if name == "mem-set":
        parser.add_argument(
            "memory", metavar="MEM", type=kibibytes, help="MiB, or a number with k, m, g or t"
        )
    elif name == "vcpu-set":
        parser.add_argument("vcpus", metavar="COUNT", type=int, help="how many are to be online")
    else:
        parser.add_argument("key", metavar="LETTER", type=letter, help="the key of SysRq")


def run(call: Invocation) -> int:
    """Write the target where the guest looks for it, which then does as it likes."""
    args = call.args
    domain, record = owned(call.host, call.names, args.domain)
    if not record.store:
        raise StateError(
            f'domain "{record.name}" has no store, through which it could be told',
            hint="guests that do not speak noxs have one, where storesd or xenstored runs",
        )
    living(domain)
    if args.verb == "mem-set":
        _check_memory(record, args.memory)
        _tell_memory(call.host, domain, record, args.memory)
        return 0
    pairs: dict[str, Value]
    if args.verb == "vcpu-set":
        pairs = availability(args.vcpus, _vcpus(record, args.vcpus))
    else:
        pairs = {"control/sysrq": args.key}
    store.tell(call.host, record, pairs)
    return 0


def _tell_memory(host: Host, domain: Domain, record: Record, kib: int) -> None:
    """Set Xen's limit and tell the guest; neither, if one of them fails."""
    before = domain.info.max_pages << 2
    host.ctrl.domain_setmaxmem(record.domid, kib + SLACK_KIB)
    try:
        store.tell(host, record, {"memory/target": kib})
    except ChaosError:
        host.ctrl.domain_setmaxmem(record.domid, before)
        raise


def _check_memory(record: Record, kib: int) -> None:
    most = int(record.config.get("maxmem", 0))
    if kib > most << 10:
        raise StateError(
            f'domain "{record.name}" can have {most} MiB at most',
            hint="maxmem= in its configuration says so",
        )


def _vcpus(record: Record, wanted: int) -> int:
    most = int(record.config.get("maxvcpus", 1))
    if not 1 <= wanted <= most:
        raise StateError(
            f'domain "{record.name}" can have 1 to {most} vCPUs online, not {wanted}',
            hint="maxvcpus= in its configuration says so",
        )
    return most


def availability(online: int, vcpus: int) -> dict[str, Value]:
    """The nodes that tell a guest which of its ``vcpus`` are to be online."""
    return {f"cpu/{n}/availability": "online" if n < online else "offline" for n in range(vcpus)}
