"""Residual branches, in the styles that regions must tell apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attend, Attention, attend_fused, make_mlp, merge_heads
from .by_hand import Point
from .sizes import WIDTH


class Branch(nn.Module):
    """x + gate * attention(modulated norm), the gate from the time: adaLN-Zero as in DiT."""

    def __init__(self, kind: str = "full", attend: Attend = attend_fused) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = Attention(attend)
        self.table = nn.Linear(WIDTH, 3 * WIDTH)
        self.cut = Point(kind, "attention")
        self.end = Point(kind, "branch")
        self.only = Point(kind)

    def modulation(self, emb_BD: Tensor) -> list[Tensor]:
        return list(self.table(emb_BD)[:, None].chunk(3, dim=-1))

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn(self.norm(x) * (1 + scale) + shift)
        return x + self.end(gate * self.cut(y))


class Reversed(Branch):
    """The operands of the add in the other order."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn(self.norm(x) * (1 + scale) + shift)
        return self.end(self.cut(y) * gate) + x


class InPlace(Branch):
    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn(self.norm(x).mul(1 + scale).add_(shift))
        x = x.clone()
        x += self.end(gate * self.cut(y))
        return x


class Addcmul(Branch):
    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn(torch.addcmul(shift, self.norm(x), 1 + scale))
        return torch.addcmul(x, gate, self.only(y))


class Plain(Branch):
    """No gate."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        return x + self.only(self.attn(self.norm(x)))


class Cross(Branch):
    """Cross attention: no gate, no norm, as in Latte and PixArt."""

    def __init__(self, attend: Attend = attend_fused) -> None:
        super().__init__("cross", attend)

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        return x + self.only(self.attn(x, text))


class Sandwich(Branch):
    """A norm after the attention too, and a bounded gate, as in Lumina and Mochi."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.norm_after = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        y = self.norm_after(self.attn(self.norm(x) * (1 + scale)))
        return x + self.end(self.cut(y) * torch.tanh(gate))


class ModulatedAfter(Sandwich):
    """Shift and scale after the attention: both stay fresh."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, _ = self.modulation(emb_BD)
        y = self.norm_after(self.attn(self.norm(x)))
        return x + self.end(self.cut(y) * (1 + scale) + shift)


class GateFromHidden(Branch):
    """A gate from the hidden state, and one from both (type_as: a dependence in name only)."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.to_gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        n = self.norm(x)
        y = self.attn(n * (1 + scale))
        gate = gate.type_as(x) * torch.sigmoid(self.to_gate(n))
        return x + self.end(gate * self.cut(y))


class LayerScale(Branch):
    """A learned scale is no gate: it does not change over the steps."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        return x + self.only(self.gamma * self.attn(self.norm(x)))


class FloatResidual(Branch):
    """The branch in bfloat16, gate and residual in float32."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn.to_out(self._low(self.norm(x) * (1 + scale) + shift).float())
        return (x.float() + self.end(gate.float() * self.cut(y.bfloat16()).float())).to(x.dtype)

    def _low(self, n: Tensor) -> Tensor:
        return merge_heads(self.attn.heads(n)).bfloat16()


class HalfStream(Branch):
    """The stream in bfloat16, cast up around each add and down after it."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        x = x.bfloat16()
        shift, scale, gate = self.modulation(emb_BD)
        y = self.attn((self.norm(x.float()) * (1 + scale) + shift).type_as(self.norm.weight))
        x = (x.float() + self.end(gate * self.cut(y))).bfloat16()
        return x.float()


class Summed(Branch):
    """Attention and MLP in parallel, their sum gated: each is cached before the sum."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.mlp, self.mlp_end = make_mlp(), Point("mlp")

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        n = self.norm(x) * (1 + scale)
        return x + gate * (self.only(self.attn(n)) + self.mlp_end(self.mlp(n)))


class SummedPlain(Summed):
    """Attention and MLP in parallel, no gate: two branches, each added for itself."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        n = self.norm(x)
        return x + self.only(self.attn(n)) + self.mlp_end(self.mlp(n))


class SummedBeforeProjection(Summed):
    """Attention and MLP summed, then one projection for both."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        n = self.norm(x) * (1 + scale)
        heads = self.only(merge_heads(self.attn.heads(n)))
        return x + gate * self.attn.to_out(heads + self.mlp_end(self.mlp(n)))


class SharedProjection(Branch):
    """Attention and MLP concatenated before one projection, as in Flux's single blocks."""

    def __init__(self, kind: str = "full") -> None:
        super().__init__(kind)
        self.to_mlp, self.mlp_end = nn.Linear(WIDTH, 2 * WIDTH), Point("mlp")
        self.proj = nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        n = self.norm(x) * (1 + scale)
        heads = self.only(merge_heads(self.attn.heads(n)))
        return x + gate * self.proj(
            torch.cat([heads, self.mlp_end(F.gelu(self.to_mlp(n)))], dim=-1)
        )


class TwoKeys(Branch):
    """Two attentions of one kind on one query, summed before the add: text and image keys."""

    def __init__(self) -> None:
        super().__init__("cross")
        self.other = Attention()

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, _, gate = self.modulation(emb_BD)
        n = self.norm(x)
        y = self.attn(n, text) + self.other(n, text * 2)
        return x + self.end(gate * self.cut(y))


class TwoKinds(Branch):
    """Self and cross attention summed before one add: each is cached at its own output."""

    def __init__(self) -> None:
        super().__init__("full")
        self.other = Attention()
        self.cross = Point("cross")

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, _, gate = self.modulation(emb_BD)
        n = self.norm(x)
        y = self.attn.to_out(self.only(merge_heads(self.attn.heads(n))))
        z = self.other.to_out(self.cross(merge_heads(self.other.heads(n, text))))
        return x + gate * (y + z)


class FeedsQuery(Branch):
    """The attention's output is the next attention's query before it is added."""

    def __init__(self) -> None:
        super().__init__("full")
        self.other = Attention()
        self.cross = Point("cross")

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        y = self.attn.to_out(self.only(merge_heads(self.attn.heads(self.norm(x)))))
        z = self.other.to_out(self.cross(merge_heads(self.other.heads(y, text))))
        return x + y + z


class Chained(FeedsQuery):
    """As above, and only the second attention's output is added."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        y = self.attn.to_out(self.only(merge_heads(self.attn.heads(self.norm(x)))))
        z = self.other.to_out(self.cross(merge_heads(self.other.heads(y, text))))
        return x + z


class GateInside(Branch):
    """A gate before the last projection: part of the attention, and frozen with it."""

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        _, scale, gate = self.modulation(emb_BD)
        heads = merge_heads(self.attn.heads(self.norm(x) * (1 + scale)))
        return x + self.only(self.attn.to_out(gate * heads))


class Mlp(nn.Module):
    """x + gate * mlp(modulated norm)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mlp = make_mlp()
        self.table = nn.Linear(WIDTH, 3 * WIDTH)
        self.cut = Point("mlp", "attention")
        self.end = Point("mlp", "branch")

    def forward(self, x: Tensor, emb_BD: Tensor, text: Tensor | None = None) -> Tensor:
        shift, scale, gate = self.table(emb_BD)[:, None].chunk(3, dim=-1)
        return x + self.end(gate * self.cut(self.mlp(self.norm(x) * (1 + scale) + shift)))
