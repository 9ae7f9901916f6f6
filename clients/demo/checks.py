"""What one greedy generation gave, and whether two of them are the same to the last bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from xferd.clients.demo.paging import FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """Greedy tokens, the logits that each was picked from (one row a token), and the text they make."""

    tokens: tuple[int, ...]
    logits: FloatArray
    text: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a generation compares with the reference; ``detail`` names the first difference, "" if there is none."""

    tokens_equal: bool
    logits_equal: bool
    detail: str = ""

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return self.tokens_equal and self.logits_equal


def compare(reference: Generation, other: Generation) -> Verdict:
    """Compare tokens, and logits bit by bit: equal numbers with different bits (0.0 and -0.0) count as different."""
    tokens_equal = reference.tokens == other.tokens
    if reference.logits.shape != other.logits.shape or reference.logits.dtype != other.logits.dtype:
        shapes = f"{other.logits.shape} {other.logits.dtype}, not {reference.logits.shape} {reference.logits.dtype}"
        return Verdict(tokens_equal, False, f"logits are {shapes}")
    different = _bits(reference.logits) != _bits(other.logits)
    if different.any():
        step = int(np.argmax(different.any(axis=1)))
        count = int(different[step].sum())
        gap = float(np.abs(reference.logits[step] - other.logits[step]).max())
        return Verdict(tokens_equal, False, f"{count} logits of step {step} differ, by up to {gap:g}")
    if not tokens_equal:
        return Verdict(False, True, f"tokens {other.tokens}, not {reference.tokens}")
    return Verdict(True, True)


def _bits(values: FloatArray) -> np.ndarray[tuple[int, ...], np.dtype[np.uint32]]:
    return np.ascontiguousarray(values).view(np.uint32)
