"""pool: the shells that the daemon holds ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xenctypes.errors import StateError, UsageError

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from chaos.invocation import Invocation

ACTIONS = ("list", "add", "resize", "drain", "remove")
HEADER = "Flavour                Mem VCPUs Vifs  Ready Making  Size    Served  Image"


def configure(parser: ArgumentParser, name: str) -> None:
    """Add the options."""
    del name
    parser.add_argument("action", choices=ACTIONS, nargs="?", default="list")
    parser.add_argument("flavour", nargs="?", metavar="FLAVOUR", help="its name")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="add: settings of the flavour, as in chaos.toml(5)",
    )
    parser.add_argument("--size", type=int, metavar="N", help="add, resize: shells to hold ready")
    parser.add_argument("--low", type=int, metavar="N", help="add, resize: the low-water mark")
    parser.add_argument(
        "--wait", action="store_true", help="list, add, resize, drain: until the shells are ready"
    )
    parser.add_argument("--json", action="store_true", help="print flavours as JSON")


async def serve(call: Invocation) -> int:
    """Do it."""
    args, pool = call.args, call.daemon.pool
    _check(call)
    shown = []
    drained: dict[str, Any] = {}
    names = [args.flavour] if args.flavour else list(pool.flavours)
    if args.action == "add":
        pool.add(_spec(call))
    elif args.action == "resize":
        pool.resize(args.flavour, args.size, args.low)
    elif args.action == "drain":
        async with _bar(call, "draining") as advance:
            drained["drained"] = await pool.drain(args.flavour, lambda *_: advance())
    elif args.action == "remove":
        shown = [pool.flavour(args.flavour).describe()]
        async with _bar(call, "removing") as advance:
            await pool.remove(args.flavour, lambda *_: advance())
    if args.wait and args.action != "remove":
        await _wait(call, names)
    shown = shown or [pool.flavour(name).describe() | drained for name in names]
    if args.json:
        call.print_json(shown)
    elif args.action == "list":
        call.print(HEADER, *map(_row, shown))
    return 0


def _bar(call: Invocation, what: str) -> AbstractAsyncContextManager[Callable[[], None]]:
    """A bar for the shells that a flavour has now."""
    from chaos.daemon.bar import bar

    return bar(call, what, len(call.daemon.pool.flavour(call.args.flavour).shells))


async def _wait(call: Invocation, names: Sequence[str]) -> None:
    """Wait until flavours have their shells; StateError if one cannot have them."""
    from chaos.daemon.bar import bar

    pool = call.daemon.pool
    missing = sum(pool.flavour(name).size - pool.flavour(name).ready for name in names)
    async with bar(call, "filling", missing) as advance:
        await pool.filled(names, lambda *_: advance())


def _check(call: Invocation) -> None:
    """Raise UsageError for options that do not go together."""
    args = call.args
    if args.action != "list" and not args.flavour:
        raise UsageError(f"chaos pool {args.action}: which flavour?", hint="see chaos pool --help")
    for option in ("size", "low"):
        value = getattr(args, option)
        if value is not None and not 0 <= value <= call.daemon.settings.max_shells:
            raise UsageError(
                f"chaos pool: --{option} is within 0 to {call.daemon.settings.max_shells}"
            )
    if args.action == "resize" and args.size is None:
        raise UsageError("chaos pool resize: --size is missing")


def _spec(call: Invocation) -> Any:
    import tomllib

    from chaos.daemon import settings
    from chaos.daemon.rights import check_flavour
    from xenctypes.errors import ConfigError

    args = call.args
    table: dict[str, Any] = {}
    for text in args.settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"chaos pool add: {text} is no key=value")
        try:
            table[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            table[key.strip()] = value  # text that needs no quotes
    for key in ("size", "low"):
        if getattr(args, key) is not None:
            table[key] = getattr(args, key)
    check_flavour(call.peer, table)
    for key in ("kernel", "ramdisk"):
        if isinstance(table.get(key), str) and not table[key].startswith("/"):
            table[key] = f"{call.directory}/{table[key]}"
    if "name" in table:
        raise ConfigError("the name comes in front of the settings", key="name")
    return settings.flavour({"name": args.flavour, **table})


def run(call: Invocation) -> int:
    """Without a daemon there is no pool."""
    del call
    raise StateError("no chaosd runs, and the pool is its", hint="start chaosd")


def _row(flavour: dict[str, Any]) -> str:
    image = flavour["kernel"] or "-"
    if flavour["problem"]:
        image += f"  ({flavour['problem']})"
    return (
        f"{flavour['name']:<20} {flavour['memory_mib']:5} {flavour['vcpus']:5}"
        f" {len(flavour['bridges']):4}  {flavour['ready']:5} {flavour['making']:6}"
        f" {flavour['size']:5} {flavour['served']:9}  {image}"
    )
