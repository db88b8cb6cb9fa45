"""scripts/test: linters, unit tests, the lab's own tests, and the tests in Dom0.

Every kind of host is booted once for all tests that belong to it (tests/lab/conftest.py
says which those are), and not at all if there are none. Everything runs on the first release; on
the others, unless they are asked for by name, what is marked ``every_release`` runs, on one kind of
host.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lab import cache, debian
from lab.errors import ChaosError, LabError
from lab.progress import say
from lab.release import RELEASES

PARTS = ("lint", "unit", "machine", "lab")
HOSTS = {"noxs": [], "xenstored": ["--xenstored"], "systemd": ["--init", "systemd"]}
LAB_SECONDS = 2400
NO_TESTS = 5
"""pytest's exit status when it selected nothing."""


@dataclass(frozen=True)
class Part:
    """One thing to run, and what to call it in the summary."""

    name: str
    command: list[str]
    may_be_empty: bool = False


@dataclass(frozen=True)
class Result:
    """How a part ended; ``closing`` is pytest's last line, or ""."""

    part: Part
    status: int
    seconds: float
    closing: str

    @property
    def passed(self) -> bool:
        """Whether the part is fine."""
        return self.status == 0 or (self.part.may_be_empty and self.status == NO_TESTS)


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts, all of them even if one fails; return 0 if all passed."""
    arguments = _parser().parse_args(argv)
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        _parser().error(f"no part {unknown[0]!r}: there are {', '.join(PARTS)}")
    os.chdir(cache.TREE)
    try:
        # The unit tests compile probes and the guests' header.
        debian.ensure(["gcc", "make"], debian.HEADERS)
    except ChaosError as error:
        say(str(error))
        return error.exit_code
    results = [_run_again_after_a_crash(part) for part in _parts(arguments)]
    print("\n" + "=" * 24 + " summary " + "=" * 24)
    for result in results:
        verdict = "passed" if result.passed else f"FAILED (status {result.status})"
        print(f"{result.part.name:<28} {verdict}, {result.seconds:.0f} s  {result.closing}")
    return 0 if results and all(result.passed for result in results) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/test",
        description="Run the linters, the unit tests, the lab's own tests ('machine': they boot"
        " labs from outside) and the tests in Dom0 ('lab'). Without PART: all of them.",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument(
        "--debian",
        action="append",
        choices=RELEASES,
        help="Dom0's Debian release (repeatable; default: all)",
    )
    parser.add_argument(
        "--host",
        action="append",
        choices=HOSTS,
        help="kind of Dom0 (repeatable; default: all)",
    )
    parser.add_argument("-k", metavar="EXPR", help="only tests that match, as pytest has it")
    parser.add_argument("-x", action="store_true", help="each part stops at its first failure")
    return parser


def _parts(arguments: argparse.Namespace) -> Iterator[Part]:
    chosen = arguments.parts or PARTS
    picked = [*(("-k", arguments.k) if arguments.k else ()), *(("-x",) if arguments.x else ())]
    color = ["--color=yes"] if sys.stdout.isatty() else []
    here = [sys.executable, "-m", "pytest", *color, *picked]
    empty = bool(arguments.k)
    if "lint" in chosen and not arguments.k:
        yield Part("lint", ["scripts/lint"])
    if "unit" in chosen:
        yield Part("unit", [*here, "tests/unit"], may_be_empty=empty)
    if "machine" in chosen:
        yield Part("machine", [*here, "tests/machine"], may_be_empty=empty)
    if "lab" not in chosen:
        return
    for number in arguments.debian or RELEASES:
        brief = not arguments.debian and number != next(iter(RELEASES))
        chosen_tests = ["-m", "every_release"] if brief else []
        for host in arguments.host or (["noxs"] if brief else HOSTS):
            if host != "noxs" and not _wanted(host):
                continue
            # -P: the project comes from its installed wheel, not from the tree.
            inside = ["python3", "-P", "-m", "pytest", "-p", "no:cacheprovider", *color, *picked]
            run = [sys.executable, "-m", "lab", "run", "--debian", number, *HOSTS[host]]
            limit = ["--timeout", str(LAB_SECONDS), "--"]
            name = f"lab Debian {number} {host}"
            yield Part(
                name, [*run, *limit, *inside, *chosen_tests, "tests/lab"], may_be_empty=empty
            )


def _wanted(host: str) -> bool:
    """Whether any test is marked for that kind of host."""
    words = [f"mark.{host}"] + (["mark.anyhost"] if host == "xenstored" else [])
    texts = [path.read_text() for path in (cache.TREE / "tests" / "lab").rglob("test_*.py")]
    return any(word in text for word in words for text in texts)


def _run_again_after_a_crash(part: Part) -> Result:
    """Run a part; once more if the lab itself broke, which says nothing about the tests."""
    result = _run(part)
    if result.status == LabError.exit_code and part.name.startswith("lab "):
        say(f"{part.name}: the lab broke down (above); one more try in a new boot")
        result = _run(part)
    return result


def _run(part: Part) -> Result:
    print(f"\n{'=' * 8} {part.name}: {' '.join(part.command)}", flush=True)
    start = time.monotonic()
    closing = ""
    with subprocess.Popen(part.command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
            text = line.decode(errors="replace").strip()
            if text.startswith("=") and " in " in text:
                closing = text.strip("= ")
    return Result(part, process.returncode, time.monotonic() - start, closing)


if __name__ == "__main__":
    sys.exit(main())
