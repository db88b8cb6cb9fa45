"""A create as a list of named steps.

The list is data: timing, rollback, the profile and the fault tests come from
it, and the pool cuts it in two at the seam between the phases::

        prepare                          execute
    +---------------------------+   +-------------------------+
    | domain, memory, channels, |-->| image, device page,     |--> running
    | rings: nobody waits       |   | unpause: somebody waits |
    +---------------------------+   +-------------------------+
         | any step fails                | any step fails
         v                               v
    undo, last step first  <-------------+

An undo is called for every step that was begun, the failing one included, so it
looks at what its step recorded in the context and tolerates finding nothing.
"""

from __future__ import annotations

from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from chaos.signals import held
from xenctypes.errors import ChaosError, StepError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PREPARE = "prepare"
EXECUTE = "execute"

# The six categories of LightVM's Figure 5, which the profile adds up by.
CONFIG = "configuration"
TOOLSTACK = "toolstack"
HYPERVISOR = "hypervisor"
BUS = "bus"
DEVICES = "devices"
IMAGE = "image"

Context = TypeVar("Context")


class Step(NamedTuple, Generic[Context]):
    """One step: ``do`` acts on the context and records there what ``undo`` takes back."""

    name: str
    phase: str
    category: str
    do: Callable[[Context], None]
    undo: Callable[[Context], None] | None = None


class Timing(NamedTuple):
    """How long a step took: ``start`` and ``ns`` on CLOCK_MONOTONIC, nanoseconds."""

    name: str
    phase: str
    category: str
    start: int
    ns: int

    @property
    def end(self) -> int:
        """When it was done."""
        return self.start + self.ns


class Spent(NamedTuple):
    """Timings as plain values, one for each step, and the nanoseconds of each phase."""

    steps: list[dict[str, Any]]
    prepare: int
    execute: int

    def __add__(self, other: Spent) -> Spent:  # type: ignore[override]
        return Spent(
            self.steps + other.steps, self.prepare + other.prepare, self.execute + other.execute
        )


def spent(timings: Iterable[Timing]) -> Spent:
    """What timings come to."""
    steps, prepare, execute = [], 0, 0
    for name, phase, category, start, ns in timings:
        steps.append(
            {"name": name, "phase": phase, "category": category, "start_ns": start, "ms": ns / 1e6}
        )
        if phase == PREPARE:
            prepare += ns
        else:
            execute += ns
    return Spent(steps, prepare, execute)


def profile_of(spent: Spent, ready_ms: float | None) -> dict[str, Any]:
    """A create as its client is shown it: milliseconds for each step, their sums, until ready."""
    prepare, execute = spent.prepare / 1e6, spent.execute / 1e6
    return {
        "steps": spent.steps,
        "prepare_ms": prepare,
        "execute_ms": execute,
        "create_ms": prepare + execute,
        "ready_ms": ready_ms,
    }


def perform(
    steps: Sequence[Step[Context]],
    context: Context,
    timings: list[Timing],
    *,
    subject: str,
    told: Callable[[str], None] | None = None,
) -> None:
    """Do ``steps`` in order, appending one Timing each; on a failure undo all that were begun.

    ``told`` is called with the name of each step that is done.
    ``subject`` is what an error message calls the thing being made. Raises StepError with
    the cause chained; KeyboardInterrupt and the like undo too and pass through.
    """
    start = perf_counter_ns()
    for index, step in enumerate(steps):
        try:
            step.do(context)
        except BaseException as error:
            left = roll_back(steps[: index + 1], context)
            if not isinstance(error, Exception):
                for line in left:
                    error.add_note(line)
                raise
            failure = _failure(subject, step.name, error)
            for line in left:
                failure.add_note(line)
            raise failure from error
        # One look at the clock for both: a system call where Xen's clock is not known to be stable.
        end = perf_counter_ns()
        timings.append(Timing(step.name, step.phase, step.category, start, end - start))
        start = end
        if told is not None:
            told(step.name)
            start = perf_counter_ns()


def roll_back(steps: Iterable[Step[Context]], context: Context) -> list[str]:
    """Undo ``steps``, last first; returns a line for each undo that failed itself.

    Signals that would end the command wait until all is undone.
    """
    left = []
    with held():
        for step in reversed(list(steps)):
            if step.undo is None:
                continue
            try:
                step.undo(context)
            except Exception as error:  # noqa: BLE001 - one failed undo must not stop the others
                left.append(f"undoing {step.name} failed: {error}")
    return left


def _failure(subject: str, step: str, error: Exception) -> ChaosError:
    """Name the subject and the step in front of the cause, keeping its class when it is ours."""
    hint = error.hint if isinstance(error, ChaosError) else ""
    reason = error.message if isinstance(error, ChaosError) else f"{type(error).__name__}: {error}"
    failure = StepError(step, f"{subject}: {step}: {reason}", hint=hint)
    if isinstance(error, ChaosError):
        failure.exit_code = error.exit_code
    return failure
