"""What is tried of many steps by tests that are not to take long: some today, others tomorrow.

After EVERY days each has had its turn. The day is in the header of a run; to have its sample
again, set CHAOS_TEST_DAY to it.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    T = TypeVar("T")

MARK = "thorough"
EVERY = 6
DAY = int(os.environ.get("CHAOS_TEST_DAY") or time.time() // 86400)


def sample(steps: Sequence[T], every: int = EVERY) -> Sequence[T]:
    """One of each ``every`` steps, at least one."""
    stride = min(every, len(steps))
    return [step for at, step in enumerate(steps) if (at + DAY) % stride == 0]


def sampled(steps: Sequence[str]) -> list[object]:
    """Values for ``parametrize``: what is not in the sample is for the thorough."""
    chosen = set(sample(steps))
    return [
        step if step in chosen else pytest.param(step, marks=getattr(pytest.mark, MARK))
        for step in steps
    ]
