"""A model, a call of it and the kinds of its attentions; and lists of such cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attention import SPELLINGS
from .branches import (
    Addcmul,
    Branch,
    Chained,
    Cross,
    FeedsQuery,
    FloatResidual,
    GateFromHidden,
    GateInside,
    HalfStream,
    InPlace,
    LayerScale,
    Mlp,
    ModulatedAfter,
    Plain,
    Reversed,
    Sandwich,
    SharedProjection,
    Summed,
    SummedBeforeProjection,
    SummedPlain,
    TwoKeys,
    TwoKinds,
)
from .image import ClassImage, Image, LongSkip, Packed, Refined, Windowed
from .joint import JointImage, JointText, OneStream
from .sizes import CHANNELS, WIDTH
from .video import Factorized, FramesFirst, Full3d, Rearranged


@dataclass(frozen=True)
class Sizes:
    """Latent sizes before patches: `height` and `width` are multiples of 2 * PATCH where windows
    are taken."""

    batch: int = 2
    frames: int = 3
    height: int = 8
    width: int = 4
    text: int = 5


@dataclass(frozen=True)
class Case:
    """A model, its latents' layout, and the kinds of its attentions in execution order."""

    name: str
    make: Callable[[], nn.Module]
    layout: str
    kinds: tuple[str, ...]
    condition: str = "text"
    sizes: Sizes = field(default_factory=Sizes)

    def __str__(self) -> str:
        return self.name

    def model(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make().eval()

    def call(self, step: int = 0, sizes: Sizes | None = None) -> dict[str, Tensor]:
        """The arguments of one step: latents and time differ from step to step, text does not."""
        s = sizes or self.sizes
        shapes = {
            "BCHW": (s.batch, CHANNELS, s.height, s.width),
            "BNC": (s.batch, s.height * s.width, CHANNELS),
            "BCTHW": (s.batch, CHANNELS, s.frames, s.height, s.width),
            "BTCHW": (s.batch, s.frames, CHANNELS, s.height, s.width),
        }
        generator = torch.Generator().manual_seed(100 + step)
        call = {
            f"x_{self.layout}": torch.randn(shapes[self.layout], generator=generator),
            "t_B": torch.full((s.batch,), 1.0 - 0.13 * step),
        }
        fixed = torch.Generator().manual_seed(7)
        if self.condition == "text":
            call["text_BLD"] = torch.randn(s.batch, s.text, WIDTH, generator=fixed)
        elif self.condition == "label":
            call["label_B"] = torch.arange(s.batch)
        return call


def _styles(*styles: type[nn.Module]) -> list[Case]:
    return [
        Case(style.__name__, lambda style=style: Image(style(), Mlp(), style()), "BCHW", kinds * 2)
        for style in styles
        for kinds in [
            ("full", "cross")
            if issubclass(style, (TwoKinds, FeedsQuery))
            else ("cross",) * (2 if issubclass(style, TwoKeys) else 1)
            if issubclass(style, (Cross, TwoKeys))
            else ("full",)
        ]
    ]


STYLES: tuple[Case, ...] = tuple(
    _styles(
        Branch,
        Reversed,
        InPlace,
        Addcmul,
        Plain,
        Cross,
        Sandwich,
        ModulatedAfter,
        GateFromHidden,
        GateInside,
        LayerScale,
        FloatResidual,
        HalfStream,
        Summed,
        SummedPlain,
        SummedBeforeProjection,
        SharedProjection,
        TwoKeys,
        TwoKinds,
        FeedsQuery,
        Chained,
    )
)
"""One residual branch each, twice in an image model with an MLP between."""
FACTORIZED = ("spatial", "cross", "temporal")
MODELS: tuple[Case, ...] = (
    Case("Factorized", Factorized, "BCTHW", FACTORIZED),
    Case("FramesFirst", FramesFirst, "BTCHW", FACTORIZED),
    Case("Rearranged", Rearranged, "BCTHW", ("spatial", "temporal", "cross")),
    Case("Full3d", Full3d, "BCTHW", ("full", "cross")),
    Case("JointImage", JointImage, "BCHW", ("joint", "joint")),
    Case("JointSliced", lambda: JointImage(sliced=True), "BCHW", ("joint", "joint")),
    Case("JointText", JointText, "BCHW", ("joint",)),
    Case("OneStream", OneStream, "BCHW", ("joint", "joint")),
    Case("Refined", Refined, "BCHW", ("other", "other", "full", "cross", "full", "cross")),
    Case("Windowed", Windowed, "BCHW", ("spatial", "spatial"), "none"),
    Case("ClassImage", ClassImage, "BCHW", ("full", "full"), "label"),
    Case("Packed", Packed, "BNC", ("full", "cross")),
    Case("LongSkip", LongSkip, "BCHW", ("full", "full", "full")),
)
SPELLED: tuple[Case, ...] = tuple(
    Case(
        attend.__name__,
        lambda a=attend: Image(Branch("full", a), Cross(a)),
        "BCHW",
        ("full", "cross"),
    )
    for attend in SPELLINGS[1:]
)
ONE_BLOCK = Case("OneBlock", lambda: Image(Branch(), Mlp()), "BCHW", ("full",))
CASES: tuple[Case, ...] = (*MODELS, *SPELLED, *STYLES)
