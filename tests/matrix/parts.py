"""Small parts of pipelines beside their transformers: images, what encodes them, and stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from .row import height


class Part(nn.Module):
    """What pipelines ask of each of their parts."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))  # offloading looks at the first one's device


class StandIn(Part):
    """A VAE, or another part, that is asked for attributes alone.

    `config`: the attributes of its configuration; `attributes`: its own.
    """

    def __init__(self, config: dict[str, Any], **attributes: Any) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        for name, value in attributes.items():
            setattr(self, name, value)


class Connectors(Part):
    """Gives the text to video and audio as it is."""

    def forward(self, text: Tensor, mask: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return text, text, mask


def ones(batch: int, length: int = 5) -> Tensor:
    """Returns a mask of text that keeps all tokens."""
    return torch.ones(batch, length)


def make_image(size: int) -> Image.Image:
    """Returns a picture of noise, 64 pixels wide."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randint(256, (height(size), 64, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def make_image_encoder() -> Any:
    """Returns a vision model whose hidden states are 8 wide."""
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
    )
    return transformers.CLIPVisionModel(config).eval()


def make_image_processor() -> Any:
    """Returns what makes pictures of 16 times 16 pixels of them."""
    side = {"height": 16, "width": 16}
    return transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=side)
