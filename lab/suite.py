"""scripts/test: linters, unit tests, the lab's own tests, the tests in Dom0, and the bounds.

Every kind of host is booted once for all tests that belong to it (tests/lab/conftest.py
says which those are), and not at all if there are none. Everything runs on the first release; on
the others, unless they are asked for by name, what is marked ``every_release`` runs, on one kind of
host. Tests that try every step of something take a sample of the steps, of each day another, unless
``--thorough`` is given; $CHAOS_TEST_DAY, which the header of their output tells, repeats a sample.

One lab runs at a time; the linters and the unit tests run beside the first of them where there are
two processors. The bounds (scripts/bench --quick) come last, when nothing is left to run beside
them. What they print is shown part by part.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from lab import cache, debian
from lab.errors import ChaosError, LabError
from lab.progress import say
from lab.release import RELEASES

PARTS = ("lint", "unit", "machine", "lab", "bench")
HOSTS = {"noxs": [], "xenstored": ["--xenstored"], "systemd": ["--init", "systemd"]}
LAB_SECONDS = 3300
THOROUGH_SECONDS = 5400
THOROUGH_MEMORY = "6G"
DAY = "CHAOS_TEST_DAY"
"""The variable that chooses the samples: tests/lab/sampling.py."""
NO_TESTS = 5
"""pytest's exit status when it selected nothing."""


@dataclass(frozen=True)
class Part:
    """One thing to run, and what to call it in the summary."""

    name: str
    command: list[str]
    may_be_empty: bool = False

    @property
    def boots(self) -> bool:
        """Whether it boots labs."""
        return self.name.startswith(("lab ", "machine", "bench"))


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
    parts = list(_parts(arguments))
    take_children_along()
    results = _Runner(parts).run(min(arguments.jobs or _lanes(), len(parts)))
    print("\n" + "=" * 24 + " summary " + "=" * 24)
    for result in results:
        verdict = "passed" if result.passed else f"FAILED (status {result.status})"
        print(f"{result.part.name:<28} {verdict}, {result.seconds:.0f} s  {result.closing}")
    return 0 if results and all(result.passed for result in results) else 1


def take_children_along() -> None:
    """Have SIGTERM end what the parts started too: a lab is not to outlive who wanted it."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/test",
        description="Run the linters, the unit tests, the lab's own tests ('machine': they boot"
        " labs from outside), the tests in Dom0 ('lab') and the benchmarks' bounds ('bench')."
        " Without PART: all of them.",
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
    parser.add_argument(
        "-j",
        "--jobs",
        type=int,
        choices=(1, 2),
        metavar="N",
        help="parts that run at a time, 1 or 2 (default: 2 where there are two processors)",
    )
    parser.add_argument(
        "--thorough",
        action="store_true",
        help="try every step and every round where else a sample is taken: before a release",
    )
    parser.add_argument("-k", metavar="EXPR", help="only tests that match, as pytest has it")
    parser.add_argument("-x", action="store_true", help="each part stops at its first failure")
    return parser


def _parts(arguments: argparse.Namespace) -> Iterator[Part]:
    """All parts, the longest of them first."""
    chosen = arguments.parts or PARTS
    picked = [*(("-k", arguments.k) if arguments.k else ()), *(("-x",) if arguments.x else ())]
    color = ["--color=yes"] if sys.stdout.isatty() else []
    here = [sys.executable, "-m", "pytest", *color, *picked]
    empty = bool(arguments.k)
    labs = []
    for number in (arguments.debian or RELEASES) if "lab" in chosen else ():
        brief = not arguments.debian and number != next(iter(RELEASES))
        chosen_tests = ["-m", "every_release"] if brief else []
        for host in arguments.host or (["noxs"] if brief else HOSTS):
            files = _files(host, brief=brief)
            if not files:
                continue
            # -P: the project comes from its installed wheel, not from the tree.
            inside = ["python3", "-P", "-m", "pytest", "-p", "no:cacheprovider", *color, *picked]
            inside += ["--durations=15", "--durations-min=5"]
            inside += ["--thorough"] if arguments.thorough else []
            run = [sys.executable, "-m", "lab", "run", "--debian", number, *HOSTS[host]]
            run += [f"--env={DAY}={os.environ[DAY]}"] if DAY in os.environ else []
            limit = ["--timeout", str(THOROUGH_SECONDS if arguments.thorough else LAB_SECONDS)]
            limit += ["--memory", THOROUGH_MEMORY] if arguments.thorough else []
            name = f"lab Debian {number} {host}"
            command = [*run, *limit, "--", *inside, *chosen_tests, *files]
            labs.append(Part(name, command, may_be_empty=empty))
    yield from labs[:1]
    if "lint" in chosen and not arguments.k:
        yield Part("lint", ["scripts/lint"])
    if "unit" in chosen:
        yield Part("unit", [*here, "tests/unit"], may_be_empty=empty)
    # The last release's image may have to be built: not at the very end.
    yield from labs[1:][-1:]
    if "machine" in chosen:
        yield Part("machine", [*here, "tests/machine"], may_be_empty=empty)
    yield from labs[1:-1]
    if "bench" in chosen and not arguments.k:
        number = (arguments.debian or list(RELEASES))[0]
        yield Part("bench", ["scripts/bench", "--quick", "--debian", number])


def _lanes() -> int:
    """How many parts this machine can run at a time."""
    return 2 if (os.cpu_count() or 1) > 1 else 1


def _files(host: str, *, brief: bool) -> list[str]:
    """The files with tests for that kind of host, with ``brief`` for every release.

    pytest would find out as well, but has to compile all others for that: half a minute, in Dom0.
    """
    words = {"noxs": [""], "xenstored": ["mark.xenstored", "mark.anyhost"]}
    wanted = [words.get(host, [f"mark.{host}"]), ["mark.every_release"] if brief else [""]]
    return [
        str(path.relative_to(cache.TREE))
        for path in sorted((cache.TREE / "tests" / "lab").rglob("test_*.py"))
        if all(any(word in path.read_text() for word in each) for each in wanted)
    ]


class _Runner:
    """Runs parts in one or two lanes, and shows what they print in the order of the parts."""

    def __init__(self, parts: list[Part]) -> None:
        self._waiting = list(reversed(parts))
        self._order = list(parts)  # those whose output is not all shown; the first is shown live
        self._kept: dict[str, list[bytes]] = {part.name: [] for part in parts}
        self._done: dict[str, Result] = {}
        self._lock = threading.Lock()
        self._lab_runs = False
        self._processes: set[subprocess.Popen[bytes]] = set()

    def run(self, lanes: int) -> list[Result]:
        """Run all parts; their results in the order in which they were given."""
        parts = list(self._order)
        threads = [threading.Thread(target=self._lane) for _ in range(lanes)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            with self._lock:
                self._waiting.clear()
                for process in self._processes:
                    process.terminate()
            for thread in threads:
                thread.join()
            raise
        return [self._done[part.name] for part in parts]

    def _lane(self) -> None:
        while (part := self._next()) is not None:
            result = self._run(part)
            if result.status == LabError.exit_code and part.name.startswith(("lab ", "bench")):
                # The lab itself broke, which says nothing about the tests.
                again = f"{part.name}: the lab broke down (above); one more try in a new boot"
                self._show(part, f"lab: {again}\n".encode())
                result = self._run(part)
            self._end(part, result)

    def _next(self) -> Part | None:
        """The next part that may begin: of those that boot labs, one at a time."""
        with self._lock:
            for part in reversed(self._waiting):
                if not (part.boots and self._lab_runs):
                    self._waiting.remove(part)
                    self._lab_runs = self._lab_runs or part.boots
                    return part
        return None  # what is left is for the lane that has the lab

    def _run(self, part: Part) -> Result:
        start = time.monotonic()
        closing = ""
        self._show(part, f"\n{'=' * 8} {part.name}: {' '.join(part.command)}\n".encode())
        with subprocess.Popen(
            part.command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            with self._lock:
                self._processes.add(process)
            assert process.stdout is not None
            for line in process.stdout:
                self._show(part, line)
                text = line.decode(errors="replace").strip()
                if text.startswith("=") and " in " in text:
                    closing = text.strip("= ")
        with self._lock:
            self._processes.discard(process)
        return Result(part, process.returncode, time.monotonic() - start, closing)

    def _show(self, part: Part, line: bytes) -> None:
        """Print a line, or keep it until the parts before have ended."""
        with self._lock:
            if self._order[0] is part:
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()
            else:
                self._kept[part.name].append(line)

    def _end(self, part: Part, result: Result) -> None:
        with self._lock:
            if part.boots:
                self._lab_runs = False
            self._done[part.name] = result
            while self._order and self._order[0].name in self._done:
                del self._order[0]
                if self._order:
                    sys.stdout.buffer.writelines(self._kept.pop(self._order[0].name))
                    sys.stdout.buffer.flush()
            if self._order and part in self._order:
                verdict = "passed" if result.passed else "FAILED"
                print(f"-------- meanwhile, {part.name}: {verdict}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
