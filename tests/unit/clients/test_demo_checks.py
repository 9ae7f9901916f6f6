"""A hand-over that lost a single bit is found out."""

import dataclasses

import numpy as np
import pytest

from xferd.clients.demo.checks import Generation, compare


@pytest.fixture
def reference():
    logits = np.random.default_rng(3).standard_normal((4, 50)).astype(np.float32)
    logits[2, 7] = 0.0
    return Generation(tuple(int(row.argmax()) for row in logits), logits, "four words of text")


def altered(generation, step, token, value):
    logits = generation.logits.copy()
    logits[step, token] = value
    return dataclasses.replace(generation, logits=logits)


def test_a_generation_equals_its_copy(reference):
    verdict = compare(reference, dataclasses.replace(reference, logits=reference.logits.copy()))
    assert (verdict.tokens_equal, verdict.logits_equal, verdict.is_same, verdict.detail) == (True, True, True, "")


def test_one_bit_of_one_logit_makes_a_difference(reference):
    other = altered(reference, 3, 11, np.nextafter(reference.logits[3, 11], np.float32(np.inf)))
    verdict = compare(reference, other)
    assert verdict.tokens_equal
    assert not verdict.logits_equal
    assert not verdict.is_same
    assert verdict.detail.startswith("1 logits of step 3 differ")


def test_the_sign_of_zero_makes_a_difference(reference):
    verdict = compare(reference, altered(reference, 2, 7, -0.0))
    assert not verdict.logits_equal


def test_nan_is_equal_to_the_same_nan_and_to_nothing_else(reference):
    broken = altered(reference, 1, 1, np.nan)
    assert compare(broken, broken).is_same
    assert not compare(reference, broken).is_same


def test_another_token_makes_a_difference(reference):
    other = dataclasses.replace(reference, tokens=(*reference.tokens[:-1], reference.tokens[-1] + 1))
    verdict = compare(reference, other)
    assert not verdict.tokens_equal
    assert not verdict.is_same
    assert str(other.tokens) in verdict.detail


def test_fewer_steps_make_a_difference(reference):
    short = Generation(reference.tokens[:3], reference.logits[:3], "")
    verdict = compare(reference, short)
    assert (verdict.tokens_equal, verdict.logits_equal) == (False, False)


def test_another_precision_makes_a_difference(reference):
    verdict = compare(reference, dataclasses.replace(reference, logits=reference.logits.astype(np.float64)))
    assert not verdict.logits_equal
