"""What an argument may be, and what the error says where it is something else."""

import math

import numpy as np
import pytest
import torch

from sam_lab._checks import check_integer, check_nonnegative, check_positive, check_scalar

NUMBERS = [1, 0.5, np.float32(0.5), np.int64(2), torch.tensor(0.25), torch.tensor([3])]
NONE = [True, "1", b"1", None, 1j, math.nan, math.inf, torch.ones(2), [1.0]]


@pytest.mark.parametrize("check", [check_positive, check_nonnegative])
@pytest.mark.parametrize("value", NUMBERS)
def test_a_number_of_any_library_becomes_a_float(check, value):
    found = check("lr", value)
    assert type(found) is float and found == float(value)


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize(
    ("check", "rule"), [(check_positive, "above 0"), (check_nonnegative, "of at least 0")]
)
def test_what_is_no_finite_number_is_named(check, rule, value):
    with pytest.raises(ValueError, match=f"lr must be a finite number {rule}, got "):
        check("lr", value)


def test_zero_is_nonnegative_and_not_positive():
    assert check_nonnegative("rho", 0) == 0
    with pytest.raises(ValueError, match="rho must be a finite number above 0, got 0"):
        check_positive("rho", 0)
    with pytest.raises(ValueError, match="rho must be a finite number of at least 0, got -0.1"):
        check_nonnegative("rho", -0.1)


@pytest.mark.parametrize("value", [2, np.int32(2)])
def test_an_integer_of_any_library_becomes_an_int(value):
    assert type(check_integer("k", value, 1, 2)) is int


@pytest.mark.parametrize("value", [True, 2.0, "2", None, np.float64(2)])
def test_what_is_no_integer_is_named(value):
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got "):
        check_integer("k", value, 1)


def test_an_integer_outside_its_bounds_is_told_both():
    with pytest.raises(ValueError, match="k must be an integer between 1 and 2, got 3"):
        check_integer("k", 3, 1, 2)


def test_a_scalar_comes_back_as_it_is():
    loss = torch.ones(1, 1, requires_grad=True)
    assert check_scalar(loss) is loss
