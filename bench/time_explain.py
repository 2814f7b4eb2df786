"""Measures the seconds of `pabc explain` on full-size models, without their weights.

    python bench/time_explain.py --out bench/results/explain.json [NAME ...]

Each model has the depth, width and inputs of a published configuration, in bfloat16 on the meta
device. A row's `seconds` are those of a process, `python -m pabc explain bench.time_explain:NAME`,
from start to end; `cpu_seconds` is its CPU time, and `export_seconds` the share of torch.export.

Shapes: B batch, C channels, T frames, H x W latent pixels, L text tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models import embeddings
from torch import Tensor, nn

from pabc.models import LatteClass, LatteT2V, OpenSora12, OpenSoraPlan11, OpenSoraPlan12

B = 2  # one clip or image with guidance
Example = tuple[nn.Module, tuple[()], dict[str, Any]]


def make(build: Callable[..., nn.Module], config: Mapping[str, Any], **inputs: Any) -> Example:
    """Returns the model of a configuration in eval mode, and the keyword arguments of a call."""
    with torch.device("meta"):
        return build(**config).to(torch.bfloat16).eval(), (), inputs


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Returns an input without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def steps() -> Tensor:
    """Returns a timestep per sample, without data."""
    return meta(B, dtype=torch.long)


PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
}
"""The settings that Latte and Open-Sora-Plan 1.1 take from PixArt-alpha."""
LATTE = {**PIXART, "sample_size": 64, "video_length": 16}


def latte() -> Example:
    """Returns Latte-1, 16 frames of 512 x 512."""
    extra = {"num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single"}
    return make(
        diffusers.LatteTransformer3DModel,
        {**LATTE, **extra},
        hidden_states=meta(B, 4, 16, 64, 64),
        timestep=steps(),
        encoder_hidden_states=meta(B, 120, 4096),
    )


def cogvideox() -> Example:
    """Returns CogVideoX-5B, 49 frames of 480 x 720."""
    grid = (30, 45)
    with torch.device("meta"):
        rotary = embeddings.get_3d_rotary_pos_embed(64, ((0, 0), grid), grid, 13, device="meta")
    return make(
        diffusers.CogVideoXTransformer3DModel,
        {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
        hidden_states=meta(B, 13, 16, 60, 90),
        encoder_hidden_states=meta(B, 226, 4096),
        timestep=steps(),
        image_rotary_emb=rotary,
    )


def allegro() -> Example:
    """Returns Allegro, 88 frames of 720 x 1280."""
    num_tokens = 22 * 45 * 80
    tables = tuple((meta(n, 32, dtype=torch.float32),) * 2 for n in (22, 45, 80))
    return make(
        diffusers.AllegroTransformer3DModel,
        {},
        hidden_states=meta(B, 4, 22, 90, 160),
        encoder_hidden_states=meta(B, 512, 4096),
        timestep=steps(),
        attention_mask=meta(B, 22, 90, 160),
        encoder_attention_mask=meta(B, 512),
        image_rotary_emb=(tables, tuple(meta(1, num_tokens, dtype=torch.long) for _ in range(3))),
    )


def wan() -> Example:
    """Returns Wan 2.1 14B, 81 frames of 720 x 1280."""
    return make(
        diffusers.WanTransformer3DModel,
        {},
        hidden_states=meta(B, 16, 21, 90, 160),
        timestep=steps(),
        encoder_hidden_states=meta(B, 512, 4096),
    )


def flux() -> Example:
    """Returns FLUX.1-dev, 1024 x 1024."""
    return make(
        diffusers.FluxTransformer2DModel,
        {"guidance_embeds": True},
        hidden_states=meta(B, 4096, 64),
        encoder_hidden_states=meta(B, 512, 4096),
        pooled_projections=meta(B, 768),
        timestep=meta(B),
        img_ids=meta(4096, 3),
        txt_ids=meta(512, 3),
        guidance=meta(B, dtype=torch.float32),
    )


def _sd3(**config: Any) -> Example:
    return make(
        diffusers.SD3Transformer2DModel,
        config,
        hidden_states=meta(B, 16, 128, 128),
        encoder_hidden_states=meta(B, 333, 4096),
        pooled_projections=meta(B, 2048),
        timestep=steps(),
    )


def sd3_medium() -> Example:
    """Returns Stable Diffusion 3 Medium, 1024 x 1024."""
    heads = {"num_attention_heads": 24, "caption_projection_dim": 24 * 64}
    return _sd3(num_layers=24, pos_embed_max_size=192, **heads)


def sd35_large() -> Example:
    """Returns Stable Diffusion 3.5 Large, 1024 x 1024."""
    heads = {"num_attention_heads": 38, "caption_projection_dim": 38 * 64}
    return _sd3(num_layers=38, pos_embed_max_size=192, qk_norm="rms_norm", **heads)


def pixart() -> Example:
    """Returns PixArt-alpha XL/2, 1024 x 1024."""
    return make(
        diffusers.PixArtTransformer2DModel,
        {**PIXART, "sample_size": 128},
        hidden_states=meta(B, 4, 128, 128),
        encoder_hidden_states=meta(B, 120, 4096),
        timestep=steps(),
        added_cond_kwargs={"resolution": meta(B, 2), "aspect_ratio": meta(B, 1)},
    )


def hunyuan_video() -> Example:
    """Returns HunyuanVideo, 129 frames of 720 x 1280."""
    return make(
        diffusers.HunyuanVideoTransformer3DModel,
        {},
        hidden_states=meta(B, 16, 33, 90, 160),
        timestep=steps(),
        encoder_hidden_states=meta(B, 256, 4096),
        encoder_attention_mask=meta(B, 256, dtype=torch.long),
        pooled_projections=meta(B, 768),
        guidance=meta(B),
    )


def opensora12() -> Example:
    """Returns Open-Sora 1.2, 51 frames of 720 x 1280."""
    return make(
        OpenSora12,
        {},
        x=meta(B, 4, 15, 90, 160),
        timestep=meta(B),
        y=meta(B, 1, 300, 4096),
        mask=meta(B, 300, dtype=torch.long),
        fps=meta(1),
        height=meta(1),
        width=meta(1),
    )


def opensora_plan11() -> Example:
    """Returns Open-Sora-Plan 1.1, 65 frames of 512 x 512."""
    return make(
        OpenSoraPlan11,
        {**PIXART, "sample_size": (64, 64), "video_length": 17},
        hidden_states=meta(B, 4, 17, 64, 64),
        timestep=steps(),
        encoder_hidden_states=meta(B, 1, 300, 4096),
        attention_mask=meta(B, 17, 64, 64),
        encoder_attention_mask=meta(B, 1, 300),
    )


def opensora_plan12() -> Example:
    """Returns Open-Sora-Plan 1.2, 93 frames of 720 x 1280."""
    changes = {"num_attention_heads": 24, "attention_head_dim": 96, "cross_attention_dim": 2304}
    size = {"num_layers": 32, "sample_size": (90, 160), "sample_size_t": 24, "use_rope": True}
    return make(
        OpenSoraPlan12,
        {**PIXART, **changes, **size},
        hidden_states=meta(B, 4, 24, 90, 160),
        timestep=steps(),
        encoder_hidden_states=meta(B, 1, 512, 4096),
        attention_mask=meta(B, 24, 90, 160),
        encoder_attention_mask=meta(B, 1, 512),
    )


def latte_t2v() -> Example:
    """Returns pabc's own Latte-1, 16 frames of 512 x 512."""
    return make(
        LatteT2V,
        LATTE,
        hidden_states=meta(B, 4, 16, 64, 64),
        timestep=steps(),
        encoder_hidden_states=meta(B, 120, 4096),
        encoder_attention_mask=meta(B, 120),
    )


def latte_class() -> Example:
    """Returns Latte XL/2, conditional on a class, 16 frames of 256 x 256."""
    return make(
        LatteClass,
        {"extras": 2, "num_classes": 101},
        x=meta(B, 16, 4, 32, 32),
        t=steps(),
        y=meta(B, dtype=torch.long),
    )


MODELS: tuple[Callable[[], Example], ...] = (
    latte,
    cogvideox,
    allegro,
    wan,
    flux,
    sd3_medium,
    sd35_large,
    pixart,
    hunyuan_video,
    opensora12,
    opensora_plan11,
    opensora_plan12,
    latte_t2v,
    latte_class,
)


def time_explain(name: str) -> dict[str, Any]:
    """Returns a row: the seconds of `pabc explain` on a model, and what it found."""
    here = Path(__file__).parent
    before, start = os.times(), time.perf_counter()
    printed = subprocess.run(
        [sys.executable, "-m", "pabc", "explain", f"{here.name}.{Path(__file__).stem}:{name}"],
        cwd=here.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    seconds, after = time.perf_counter() - start, os.times()
    found = re.match(r"(\d+) attentions, (\d+) regions", printed)
    assert found is not None, printed
    cpu = after.children_user + after.children_system
    return {
        "model": name,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu - before.children_user - before.children_system, 1),
        "export_seconds": round(time_export(name), 1),
        "attentions": int(found[1]),
        "regions": int(found[2]),
    }


def time_export(name: str) -> float:
    """Returns the CPU seconds of torch.export for the same capture, in a process of its own."""
    code = (
        "import time, torch; from bench.time_explain import *\n"
        "from pabc.passes.tracing.lean import *\n"
        f"model, args, kwargs = {name}()\n"
        "start = time.process_time()\n"
        "with torch.no_grad(), lean_tracing():\n"
        "    torch.export.export(model, args, kwargs, strict=False).run_decompositions({})\n"
        "print(time.process_time() - start)"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    """Times the models named on the command line, or all, and writes the table as JSON."""
    names = [model.__name__ for model in MODELS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    rows = []
    for name in options.names or names:
        rows.append(time_explain(name))
        print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        import report  # beside this script, but not where it is imported as `bench.time_explain`

        report.write_json(options.out, {**report.describe_run("meta"), "rows": rows})


if __name__ == "__main__":
    main()
