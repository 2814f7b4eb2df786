"""diffusers' Latte in a size for tests, inputs for it, and the error that Inductor may make."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
INDUCTOR_TOLERANCE = 1e-5


def make_latte(num_layers=2, **kwargs):
    torch.manual_seed(0)
    model = diffusers.LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=num_layers,
        cross_attention_dim=24,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=10,
        video_length=3,
        **kwargs,
    )
    return model.eval()


def make_inputs(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, 3, 8, 8, generator=generator)
    text = torch.randn(batch, 5, 10, generator=generator)
    return latents, text
