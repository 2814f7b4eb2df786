"""casts: composites under autocast give eager's bits, whatever they consist of."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from models import Branch, Case, Image
from models.attention import attend_einsum, attend_matmul
from reuse import compare_with_hand
from torch import nn
from torch.nn import functional as F

from pabc.passes import capture
from pabc.passes.ir import aten

WIDTH = 8


class Weights(nn.Module):
    """What the ops below take besides the input."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.k = nn.Parameter(torch.randn(WIDTH, WIDTH, 3) / 3)
        self.gru_cell, self.lstm_cell = nn.GRUCell(WIDTH, WIDTH), nn.LSTMCell(WIDTH, WIDTH)
        self.gru, self.lstm = (kind(WIDTH, WIDTH, batch_first=True) for kind in (nn.GRU, nn.LSTM))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.transformer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)


Op = Callable[[Weights, torch.Tensor], torch.Tensor]
OPS: dict[str, Op] = {
    "einsum": lambda m, x: torch.einsum("bld,de->ble", x, m.w),
    "einsum of three": lambda m, x: torch.einsum("bld,de,ef->blf", x, m.w, m.w),
    "einsum, batched": lambda m, x: torch.einsum("bld,bmd->blm", x, x),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, dims=([2], [0])),
    "inner": lambda m, x: torch.inner(x, m.w),
    "multi_dot": lambda m, x: torch.linalg.multi_dot([x[0], m.w, m.w]),
    "chain_matmul": lambda m, x: torch.chain_matmul(x[0], m.w, m.w),
    "matrix_power": lambda m, x: x @ torch.linalg.matrix_power(m.w, 3),
    "kron": lambda m, x: torch.kron(m.w, x[0]),
    "a GRU's cell": lambda m, x: m.gru_cell(x[0]),
    "an LSTM's cell": lambda m, x: m.lstm_cell(x[0])[0],
    "a GRU": lambda m, x: m.gru(x[:, :2])[0],
    "an LSTM": lambda m, x: m.lstm(x[:, :2])[0],
    "linear": lambda m, x: F.linear(x, m.w, m.w[0]),
    "matmul": lambda m, x: torch.matmul(x, m.w),
    "baddbmm": lambda m, x: torch.baddbmm(x, x @ x.mT, x),
    "conv": lambda m, x: F.conv1d(x.mT, m.k, padding=1),
    "conv with padding by name": lambda m, x: F.conv1d(x.mT, m.k, padding="same"),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, x.float(), x),
    "nn.MultiheadAttention": lambda m, x: m.attention(x, x, x, need_weights=False)[0],
    "and its weights": lambda m, x: m.attention(x, x, x)[1],
    "nn.TransformerEncoderLayer": lambda m, x: m.transformer(x),
    "layer norm": lambda m, x: F.layer_norm(x @ m.w, (WIDTH,)),
    "rms norm": lambda m, x: F.rms_norm(x @ m.w, (WIDTH,)),
    "group norm": lambda m, x: F.group_norm((x @ m.w).mT, 2),
    "softmax": lambda m, x: F.softmax(x @ m.w, -1),
    "cosine_similarity": lambda m, x: F.cosine_similarity(x, x @ m.w, -1),
    "normalize": lambda m, x: F.normalize(x @ m.w, dim=-1),
    "matrix norm": lambda m, x: torch.linalg.norm(x @ m.w, dim=(1, 2)),
    "cdist": lambda m, x: torch.cdist(x, x @ m.w),
    "square": lambda m, x: torch.square(x @ m.w),
    "trapezoid": lambda m, x: torch.trapezoid(x @ m.w),
    "interpolate": lambda m, x: F.interpolate((x @ m.w).mT, scale_factor=2.0, mode="linear"),
    "pixel_shuffle": lambda m, x: F.pixel_shuffle((x @ m.w).mT[..., None], 2),
    "rope by complex numbers": lambda m, x: torch.view_as_real(
        torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        * torch.polar(m.w[:1, :4], m.w[1:2, :4])
    ),
}  # fmt: skip


RNNS = [name for name in OPS if "GRU" in name or "LSTM" in name]
"""In float32 their bits differ by rounding, without autocast too: kernels of their own."""


class Runs(nn.Module):
    """Every op outside of, within and after a region of autocast in another one."""

    def __init__(self, regions, names):
        super().__init__()
        self.regions, self.names, self.weights = regions, names, Weights()

    def run(self, x):
        return {name: OPS[name](self.weights, x) for name in self.names}

    def forward(self, x):
        outer, inner = (
            nullcontext() if enabled is None else torch.autocast("cpu", torch.bfloat16, enabled)
            for enabled in self.regions
        )
        with outer:
            first = self.run(x)
            with inner:
                second = self.run(x.float())
            return first, second, self.run(x + 1)


MODES = {
    "around the model": (torch.bfloat16, None, None),
    "off within": (torch.bfloat16, None, False),
    "off, and on within": (torch.bfloat16, False, True),
    "in the model, off within": (None, True, False),
    "around the model, float16": (torch.float16, None, None),
}


@pytest.fixture
def _as_traced():
    """nn.MultiheadAttention has other kernels in eager mode, which no tracer sees."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.usefixtures("_as_traced")
@pytest.mark.parametrize(
    "mode",
    [
        each if each == "off within" else pytest.param(each, marks=pytest.mark.slow)
        for each in MODES
    ],
)
def test_composites_under_autocast_give_eagers_bits(mode):
    dtype, *regions = MODES[mode]
    names = [name for name in OPS if dtype is not torch.float16 or name not in RNNS]
    names = [name for name in names if _has_kernel(name)]
    torch.manual_seed(0)
    model = Runs(regions, names).eval().requires_grad_(False)
    x = torch.randn(2, 6, WIDTH)
    with torch.no_grad():
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            (gm, _), expected = capture(model, (), {"x": x}), model(x)
        found = iter(gm(x))
    wrong = [
        (name, i)
        for i, results in enumerate(expected)
        for name, result in results.items()
        if not _is_same(next(found), result, name)
    ]
    assert not wrong


@cache
def _has_kernel(name):
    """Returns whether this CPU runs the op in bfloat16: without AVX-512, it runs no LSTM."""
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            OPS[name](Weights(), torch.randn(2, 6, WIDTH))
    except RuntimeError as error:
        if "could not create a primitive" not in str(error):
            raise
        return False
    return True


def _is_same(found, expected, name):
    if found.dtype != expected.dtype:
        return False
    if name in RNNS and found.dtype == torch.float32:
        return torch.allclose(found, expected, atol=1e-6)
    return torch.equal(found, expected)


def test_what_autocast_casts_nothing_within_stays_whole():
    """A norm, a fused attention and a projection are what passes know."""

    class Known(nn.Module):
        def forward(self, x, w):
            x = F.layer_norm(F.linear(x, w), (WIDTH,))
            return F.scaled_dot_product_attention(x, x, x)

    call = {"x": torch.randn(2, 6, WIDTH), "w": torch.randn(WIDTH, WIDTH)}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        gm, _ = capture(Known(), (), call)
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    composites = {aten.linear, aten.layer_norm, aten.scaled_dot_product_attention}
    assert composites == {target.overloadpacket for target in targets} - {aten._to_copy}


@pytest.mark.parametrize("attend", [attend_einsum, attend_matmul])
def test_an_attention_by_einsum_under_autocast_is_found_and_reused(attend):
    torch.manual_seed(0)
    model = Image(Branch(attend=attend), Branch(attend=attend)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = compare_with_hand(model, Case("image", nn.Identity, "BCHW", ()))
    assert list(found.attention.values()) == ["full", "full"]
