"""Hashes of some values: the same for the same values, however they lie in memory."""

from __future__ import annotations

import pytest
import torch

from pabc.runtime.samples import hash_values

DTYPES = (
    torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool
)  # fmt: skip


def draw(dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(6, 8).gt(0).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_hash_tells_values_apart(dtype):
    x = draw(dtype)
    other = x.clone()
    other[3, 5] = 0 if x[3, 5].real.to(torch.float32) else 1
    assert hash_values([x], 48) == hash_values([x.clone()], 48)
    assert hash_values([x], 48) != hash_values([other], 48)


def test_values_of_all_dtypes_are_hashed_together():
    """Those of Lumina 2 are real and complex."""
    tensors = [draw(dtype) for dtype in DTYPES]
    found = hash_values(tensors, 48)
    assert found == hash_values([x.clone() for x in tensors], 48)
    tensors[3] = tensors[3] * 2
    assert tensors[3].is_complex() and found != hash_values(tensors, 48)


def test_a_hash_is_of_values_whatever_their_strides():
    x = draw(torch.float32)
    assert hash_values([x], 48) == hash_values([x.T.contiguous().T], 48)


def test_a_value_that_is_expanded_to_one_element_has_a_hash():
    """A timestep for a batch of one: its stride is 0, and it counts as contiguous."""
    t = torch.tensor(913)
    assert t.expand(1).stride() == (0,)
    assert hash_values([t.expand(1)], 8) == hash_values([t.reshape(1).clone()], 8)


def test_samples_are_of_all_channels():
    x = torch.zeros(64, 64)
    x[:, 1] = 1.0
    assert hash_values([x], 64) != hash_values([torch.zeros(64, 64)], 64)


def test_samples_are_spread_over_all():
    x = torch.zeros(64, 64)
    x[-2:] = 1.0
    assert hash_values([x], 64) != hash_values([torch.zeros(64, 64)], 64)


def test_there_may_be_nothing_to_hash():
    assert hash_values([], 8) == hash_values([torch.empty(0)], 8)
    assert hash_values([torch.tensor(1.0)], 8) != hash_values([torch.tensor(2.0)], 8)
