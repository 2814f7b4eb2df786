"""The blocks of the zoo's models, listed by hand, for caches made of module hooks."""

from __future__ import annotations

from torch import nn

from .entry import Entry

_DOUBLE_AND_SINGLE = ("transformer_blocks", "single_transformer_blocks")
_LISTS = {
    "Flux": _DOUBLE_AND_SINGLE,
    "Flux2": _DOUBLE_AND_SINGLE,
    "AuraFlow": ("joint_transformer_blocks", "single_transformer_blocks"),
    "BriaFibo2": ("noise_refiner", "layers"),
    "ErnieImage": ("layers",),
    "HunyuanDiT": ("blocks",),
    "Lumina 2": ("noise_refiner", "layers"),
    "Wan": ("blocks",),
    "ChronoEdit": ("blocks",),
    "HunyuanVideo": _DOUBLE_AND_SINGLE,
    "HunyuanVideo, first frame": _DOUBLE_AND_SINGLE,
    "Kandinsky5": ("visual_transformer_blocks",),
    "Kandinsky6": ("visual_transformer_blocks",),
    "MotifVideo": _DOUBLE_AND_SINGLE,
    "AceStep": ("layers",),
}
"""Names of the lists of blocks, in execution order, where there are others than
`transformer_blocks`."""
_TEXT_FIRST = ("encoder_hidden_states", "hidden_states")
_STREAMS = {
    "Flux": _TEXT_FIRST,
    "Flux2": _TEXT_FIRST,
    "SD3": _TEXT_FIRST,
    "AuraFlow": _TEXT_FIRST,
    "Kandinsky6": ("vis", "aud"),
    "LTX2": ("hidden_states", "audio_hidden_states"),
}
"""The parameters of a block that its results go on from, where there are others than
`hidden_states` and `encoder_hidden_states`."""


DEEPER = {
    "AuraFlow": ("AuraFlowTransformer2DModel", {"num_mmdit_layers": 2, "num_single_dit_layers": 2}),
    "Flux": ("FluxTransformer2DModel", {"num_layers": 2}),
    "Flux2": ("Flux2Transformer2DModel", {"num_layers": 2}),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {"num_layers": 2, "num_single_layers": 2}),
    "Kandinsky5": ("Kandinsky5Transformer3DModel", {"num_visual_blocks": 2}),
    "Kandinsky6": ("Kandinsky6Transformer3DModel", {"num_visual_blocks": 2}),
    "LTX2": ("LTX2VideoTransformer3DModel", {"num_layers": 2}),
    "Lumina 2": ("Lumina2Transformer2DModel", {"num_layers": 2}),
    "MotifVideo": (
        "MotifVideoTransformer3DModel",
        {"num_layers": 2, "num_single_layers": 4, "num_decoder_layers": 2},
    ),
}
"""Classes and the arguments with which they have two blocks of each kind that they have one of in
the zoo."""


def list_blocks(entry: Entry, model: nn.Module) -> list[list[nn.Module]]:
    """Returns the modules of each block; one of Latte is a spatial and a temporal one."""
    if entry.name == "Latte":
        pairs = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
        return [list(pair) for pair in pairs]
    names = _LISTS.get(entry.name, ("transformer_blocks",))
    return [[block] for name in names for block in getattr(model, name)]


def streams_of(entry: Entry) -> tuple[str, ...]:
    """Returns the parameters of a block that its results go on from, in the order of these."""
    return _STREAMS.get(entry.name, ("hidden_states", "encoder_hidden_states"))
