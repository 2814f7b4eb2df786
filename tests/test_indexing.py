"""indexing: masks anywhere in an index, and positions that are looked up and stay in the graph."""

import pytest
import torch
from models import WIDTH, Branch, Mlp
from reading import Plain, make, text_and_mask
from torch import nn

import pabc

STEPS = [1.0, 0.5, 0.25]


class LooksUp(Plain):
    """Scales its input by what `take` finds in tables by the timestep."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.register_buffer("steps", torch.tensor(STEPS))
        self.register_buffer("scales", torch.tensor([0.5, 1.0, 2.0]))
        self.register_buffer("table", torch.arange(24.0).view(2, 3, 4) / 24)
        self.register_buffer("columns", torch.tensor([0, 2]))
        self.rows = nn.Embedding(3, 2)

    def forward(self, x_BCHW, t_B):
        scale = sum(take(self, t_B).mean() for take in self.takes)
        return super().forward(x_BCHW * scale, t_B)


def _write_row(m, t):
    scales = m.scales.clone()
    scales[(m.steps == t[0]).nonzero()[0, 0]].mul_(2.0)
    return scales


def _add_to_row(m, t):
    scales = m.scales.clone()
    scales[(m.steps == t[0]).nonzero()[0, 0]] += 1.0
    return scales


def _as_schedulers_do(m, t):
    found = (m.steps == t[0]).nonzero()
    step = found[1 if len(found) > 1 else 0].item()
    return m.scales[step] - m.steps[step - 1]


LOOKED_UP = {
    "where": lambda m, t: m.scales[torch.where(t[0] == m.steps)[0]],
    "the first of where": lambda m, t: m.scales[torch.where(t[0] == m.steps)[0][0]],
    "as a tuple": lambda m, t: m.scales[torch.nonzero(t[0] == m.steps, as_tuple=True)[0][0]],
    "nonzero as a number": lambda m, t: m.scales[(m.steps == t[0]).nonzero().item()],
    "as schedulers do": _as_schedulers_do,
    "argmin": lambda m, t: m.scales[torch.argmin((m.steps - t[0]).abs())],
    "argmin as a number": lambda m, t: m.scales[(m.steps - t[0]).abs().argmin().item()],
    "argmin, embedded": lambda m, t: m.rows(torch.argmin((m.steps - t[0]).abs())),
    "searchsorted": lambda m, t: m.scales[torch.searchsorted(m.steps.flip(0), t[0])],
    "bucketize": lambda m, t: m.scales[torch.bucketize(t, m.steps.flip(0))],
    "masked_select": lambda m, t: m.scales.masked_select(t[0] == m.steps),
    "a mask": lambda m, t: m.scales[t[0] == m.steps],
    "three-armed where": lambda m, t: torch.where(t[0] == m.steps, m.scales, 0),
    "from the end": lambda m, t: m.scales[-(m.steps == t[0]).nonzero()[0, 0] - 1],
    "in one of dimensions": lambda m, t: m.table[1, (m.steps == t[0]).nonzero()[0, 0]],
    "after an ellipsis": lambda m, t: m.table[..., (m.steps == t[0]).nonzero()[0, 0], 1:],
    "before a vector": lambda m, t: m.table[torch.argmin(t[0] - m.steps) % 2, :, m.columns],
    "the largest of two": lambda m, t: max(t[0], m.scales[0]),
    "the least of all": lambda m, t: min(t),
}  # fmt: skip
READ = {
    "a write to a row": _write_row,
    "an addition to a row": _add_to_row,
    "a size": lambda m, t: torch.ones((2, (m.steps == t[0]).nonzero().item() + 1)).sum(),
    "a list": lambda m, t: m.scales[m.steps.tolist().index(t[0].item())],
}


@pytest.mark.parametrize("how", ["in the graph", *READ])
def test_a_step_that_is_looked_up(how):
    """In the graph, where a tensor can be the place; else each step is a capture of its own."""
    model = make(LooksUp, Branch(), Mlp())
    model.takes = [READ[how]] if how in READ else list(LOOKED_UP.values())
    compiled = pabc.compile(model, pabc.Schedule.none(STEPS), backend="eager")
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for t in STEPS:
            call = {"x_BCHW": x, "t_B": torch.full((2,), t)}
            assert torch.equal(compiled(**call), model(**call))
    assert compiled.stats.captures == (len(STEPS) if how in READ else 1)
    assert list(compiled.explain().attention.values()) == ["full"]


class ByMask(Plain):
    """Text picked by masks, in the index that `pick` has."""

    def forward(self, x_BCHW, t_B, text_BLD, mask_BL):
        picked = [pick(text_BLD, mask_BL) for pick in MASKED.values()]
        scale = sum(p.flatten()[:5].mean() + p.sum() for p in picked)
        return super().forward(x_BCHW + scale, t_B)


MASKED = {
    "x[m]": lambda x, m: x[m],
    "x[:, m]": lambda x, m: x[:, m[0]],
    "x[:, m, :]": lambda x, m: x[:, m[0], :],
    "x[..., m, :]": lambda x, m: x[..., m[0], :],
    "x[0, m]": lambda x, m: x[0, m[0]],
    "x[m, v]": lambda x, m: x[0][m[0], torch.arange(int(m[0].sum()))],
    "x[m, 3]": lambda x, m: x[m, 3],
    "x[m, n]": lambda x, m: x[0][m[0], torch.arange(WIDTH) < m[0].sum()],
    "x[v, m]": lambda x, m: x[torch.tensor([1, 0, 1])][:, m[0]],
    "x[None, m]": lambda x, m: x[None, m],
    "two on one line": lambda x, m: x[:, :4][m[:, :4]].sum() + x[m],
    "where, one match": lambda x, m: x[:, torch.where(m[0].cumsum(0) * m[0] == 1)[0]],
    "where, of both kinds": lambda x, m: torch.where(m[..., None], x, 0)[torch.where(m)],
    "nonzero": lambda x, m: x[m.nonzero(as_tuple=True)] * m.nonzero().sum(),
    "repeated": lambda x, m: x.repeat_interleave(m.sum(0) + 1, dim=1),
    "max": lambda x, m: x[:, : int(max(m.sum(1)))],
    "min": lambda x, m: x[:, : int(min(m.sum(1)))],
    "max of two": lambda x, m: x[:, : int(max(m[0].sum(), m[1].sum()))],
    "max compared": lambda x, m: x * 2 if max(m[0].sum(), m[1].sum()) > 3 else x,
    "max of a number": lambda x, m: x[:, : max(m[0].sum().item(), 2)],
}


def test_what_masks_pick():
    model = make(ByMask, Branch(), Mlp())
    compiled = pabc.compile(model, pabc.Schedule.none([1.0]), backend="eager")
    with torch.no_grad():
        for lengths in ((3, 4), (1, 2), (3, 4)):
            call = {"x_BCHW": torch.randn(2, 3, 8, 8), "t_B": torch.ones(2)}
            call |= text_and_mask(*lengths)
            assert torch.equal(compiled(**call), model(**call))
    assert compiled.stats.captures == 2


def test_extremes_are_pythons_own():
    """Of equal values the first; a NaN only where it comes first; numbers stay numbers."""
    nan = torch.tensor(float("nan"))

    class Extremes(Plain):
        def forward(self, x_BCHW, t_B):
            one, two = t_B[0] * 0 + 1.0, t_B[1] * 0 + 2.0
            found = torch.stack([max(nan, one), max(one, nan), min(two, nan, one), max(one, two)])
            assert max(1, 2) == 2 and min([3, 1], default=0) == 1 and max("ab", key=ord) == "b"
            return super().forward(x_BCHW, t_B) * found.nan_to_num(7.0).sum()

    model = make(Extremes, Branch(), Mlp())
    compiled = pabc.compile(model, pabc.Schedule.none([1.0]), backend="eager")
    call = {"x_BCHW": torch.randn(2, 3, 8, 8), "t_B": torch.ones(2)}
    with torch.no_grad():
        assert torch.equal(compiled(**call), model(**call))
