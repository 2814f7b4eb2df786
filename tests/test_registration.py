"""Ops that follow from a NamedTuple of arguments: the schema, the checks, the fake."""

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import pytest
import torch
from torch import Tensor

from pabc.kernels.registration import KernelSignature, TensorSpec

pytestmark = pytest.mark.kernels
FLOATS = (torch.float32, torch.bfloat16)


class JoinArguments(NamedTuple):
    x: Annotated[Tensor, TensorSpec("(..., T, C)", dtypes=FLOATS)]
    others: Annotated[
        Sequence[Tensor | None] | None, TensorSpec("(..., T, C)", dtypes="x", broadcast=True)
    ]
    weight: Annotated[Tensor | None, TensorSpec("(C,)")] = None
    scales: Annotated[Tensor | None, TensorSpec("(..., T, 1)")] = None
    order: Sequence[int] | None = None
    name: str = "plain"
    eps: float = 1e-6
    dtype: torch.dtype | None = None
    is_last: bool = False

    def constraints(self):
        yield "name", "'plain' or 'other'", self.name, self.name in ("plain", "other")


SIGNATURE = KernelSignature("join_of_a_test", JoinArguments)


@SIGNATURE.checked
def join(given: JoinArguments) -> list[Tensor]:
    return [given.x + sum(x for x in given.others or () if x is not None)]


OP = SIGNATURE.register(
    launch=join, reference=join, allocate=lambda given: [torch.empty_like(given.x)]
)
X = torch.ones(2, 3, 4)


def test_the_schema_is_that_of_the_fields():
    assert str(OP._schema) == (
        "pabc::join_of_a_test(Tensor x, Tensor?[]? others, Tensor? weight=None, "
        "Tensor? scales=None, int[]? order=None, "
        'str name="plain", float eps=9.9999999999999995e-07, ScalarType? dtype=None, '
        "bool is_last=False) -> Tensor[]"
    )


def test_is_an_op():
    (found,) = OP(X, [None, X, torch.ones(4)], torch.ones(4), torch.ones(2, 3, 1))
    assert torch.equal(found, 3 * X)
    torch.library.opcheck(OP, (X, [X, X]))
    (fake,) = OP(X.to("meta"), None)
    assert fake.device.type == "meta" and fake.shape == X.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0, 0]}, "x: expected shape (..., T, C), found (4,)"),
        (
            {"x": X.double()},
            "x: expected dtype torch.float32 or torch.bfloat16, found torch.float64",
        ),
        (
            {"others": [X, torch.ones(3, 3, 4)]},
            "others: expected a shape that broadcasts to (2, 3, 4), found (3, 3, 4)",
        ),
        ({"others": [X.bfloat16()]}, "others: expected dtype torch.float32, found torch.bfloat16"),
        ({"others": [X.to("meta")]}, "others: expected device cpu, found meta"),
        ({"weight": torch.ones(1, 4)}, "weight: expected shape (4,), found (1, 4)"),
        ({"scales": torch.ones(2, 3, 2)}, "scales: expected shape (2, 3, 1), found (2, 3, 2)"),
        ({"scales": torch.ones(3, 1)}, "scales: expected shape (2, 3, 1), found (3, 1)"),
        ({"name": "none"}, "name: expected 'plain' or 'other', found none"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match="expected") as error:
        join(**{"x": X, "others": None, **arguments})
    assert str(error.value) == f"join_of_a_test.{message}"


def test_the_fake_refuses_too():
    with pytest.raises(ValueError, match=r"weight: expected shape \(4,\), found \(5,\)"):
        OP(X.to("meta"), None, torch.ones(5, device="meta"))
