"""Sub-graphs: autocast and gradient modes in a model and around it, checkpoints, torch.cond."""

import pytest
import torch
from models import Branch, Case, Image, Mlp
from reuse import compare_with_hand
from torch import nn
from torch.utils.checkpoint import checkpoint

import pabc

IMAGE = Case("image", nn.Identity, "BCHW", ())


class Autocast(Branch):
    """A branch in bfloat16 with an island in float32, as a model may write them itself."""

    def forward(self, x, emb, text=None):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            shift, scale, gate = self.modulation(emb)
            with torch.autocast("cpu", enabled=False):
                n = self.norm(x.float()) * (1 + scale.float()) + shift.float()
            y = self.attn(n)
        return x + self.end(gate.float() * self.cut(y.float()))


class Island(Branch):
    """Attention in float32 whatever autocast is around the model."""

    def forward(self, x, emb, text=None):
        shift, scale, gate = self.modulation(emb)
        with torch.autocast("cpu", enabled=False):
            y = self.attn(self.norm(x.float()) * (1 + scale.float()) + shift.float())
        return x + self.end(gate * self.cut(y))


class NoGrad(Branch):
    def forward(self, x, emb, text=None):
        with torch.no_grad():
            shift, scale, gate = self.modulation(emb)
        with torch.enable_grad():
            y = self.attn(self.norm(x) * (1 + scale) + shift)
        return x + self.end(gate * self.cut(y))


class Checkpointed(Branch):
    def forward(self, x, emb, text=None):
        return checkpoint(super().forward, x, emb, use_reentrant=False)


@pytest.mark.parametrize("block", [Autocast, Island, NoGrad, Checkpointed])
def test_sub_graphs_of_a_model_are_inlined_with_their_numerics(block):
    torch.manual_seed(0)
    found = compare_with_hand(Image(block(), Mlp(), block()).eval(), IMAGE)
    assert list(found.attention.values()) == ["full", "full"]
    assert not found.outside


@pytest.mark.parametrize("block", [Branch, Autocast, Island])
def test_autocast_around_the_calls_has_the_effect_that_it_has_on_the_model(block):
    torch.manual_seed(0)
    model = Image(block(), Mlp()).eval()
    fast = pabc.compile(model, pabc.Schedule.none(range(6)), backend="eager")
    for step in range(6):
        call = IMAGE.call(step)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=step % 2 == 1):
            expected, output = model(**call), fast(**call)
        assert output.dtype == expected.dtype == (torch.bfloat16 if step % 2 else torch.float32)
        assert torch.equal(output, expected)


def test_attention_inside_of_a_conditional_is_reported():
    class Conditional(Branch):
        def forward(self, x, emb, text=None):
            n = self.norm(x)
            y = torch.cond(emb.mean() > 9, lambda n: self.attn(n), lambda n: n * 1.0, (n,))
            return x + y

    torch.manual_seed(0)
    model = Image(Conditional(), Branch()).eval()
    found = pabc.explain(model, **IMAGE.call())
    assert found.attention == {"blocks.1.attn": "full"}
    (line,) = found.outside
    assert line.startswith("cond (blocks.0): runs inner graphs (cond) with 1 attentions")
    compare_with_hand(model, IMAGE)


def test_a_stream_that_comes_out_of_a_conditional_has_lost_its_axes():
    class Conditional(nn.Module):
        def forward(self, x, emb, text=None):
            return torch.cond(emb.mean() > 9, lambda y: y.sin(), lambda y: y * 1.0, (x,))

    model = Image(Conditional(), Branch()).eval()
    message = (
        r"cannot tell its kind, since cond \(cond\) has no rule for axes; state it with kinds="
    )
    with pytest.raises(ValueError, match=message):
        pabc.explain(model, **IMAGE.call(), latents="x_bchw")
