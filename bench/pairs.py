"""Makes one list of a model's blocks, in which each takes the outputs of the one before.

FirstBlockCache and MagCache of diffusers expect that. Latte has two lists, spatial and temporal
blocks, between which its forward changes the layout: here a spatial and a temporal block are one.
The last block of SD3 has no output for the text, which caches take the difference of: here it
returns the text as it was.
"""

from __future__ import annotations

from typing import Any

from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor, nn


class Pair(nn.Module):
    """A spatial and a temporal block of Latte as one block, which keeps the stream's layout."""

    def __init__(self, spatial: nn.Module, temporal: nn.Module, position: Tensor | None) -> None:
        super().__init__()
        self.spatial, self.temporal = spatial, temporal
        self.num_frames = 0
        self.register_buffer("position", position, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        *others: Any,
    ) -> Tensor:
        """Maps hidden states [B F, S, D] and times [B F, 6 D] of F frames to hidden states."""
        assert timestep is not None
        x = self.spatial(
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            *others,
        )
        frames, tokens = self.num_frames, x.shape[1]
        x = x.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)
        if self.position is not None:
            x = x + self.position
        times = timestep[::frames].repeat_interleave(tokens, 0)
        x = self.temporal(x, None, None, None, times, *others)
        return x.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)


def pair_blocks(model: Any, num_frames: int) -> nn.Module:
    """Replaces Latte's two lists of blocks by one of pairs; leaves other models as they are."""
    if not hasattr(model, "temporal_transformer_blocks"):
        return model
    lists = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
    pairs = [Pair(*both, model.temp_pos_embed if i == 0 else None) for i, both in enumerate(lists)]
    for pair in pairs:
        pair.num_frames = num_frames
    TransformerBlockRegistry.register(Pair, TransformerBlockMetadata(return_hidden_states_index=0))
    model.transformer_blocks = nn.ModuleList(pairs)
    del model.temporal_transformer_blocks
    model.temporal_transformer_blocks = [None] * len(pairs)  # no list of blocks to hooks
    return model


def is_paired(model: Any) -> bool:
    """Returns True for a model that `pair_blocks` changed: it is called without temporal blocks."""
    return isinstance(getattr(model, "temporal_transformer_blocks", None), list)


class Last(nn.Module):
    """The last block of SD3, which also returns the text that it was given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Maps hidden states and text to text and hidden states."""
        _, found = self.block(hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
        return encoder_hidden_states, found


def complete_blocks(model: Any) -> nn.Module:
    """Replaces SD3's last block by one that returns text; leaves other models as they are."""
    blocks = getattr(model, "transformer_blocks", None)
    if blocks is None or not getattr(blocks[-1], "context_pre_only", False):
        return model
    both = TransformerBlockMetadata(
        return_hidden_states_index=1, return_encoder_hidden_states_index=0
    )
    TransformerBlockRegistry.register(Last, both)
    blocks[-1] = Last(blocks[-1])
    return model
