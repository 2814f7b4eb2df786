"""Runs ComfyUI itself, without its server: tiny models of its own classes, and its own samplers.

Weights are random. `ComfyHost(folder)` imports what is in the folder, on the CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TEXT, POOLED = 32, 16
"""The widths of a prompt's tokens, and of its one vector."""


@dataclass(frozen=True)
class Family:
    """A kind of model.

    Attributes:
        config: the name of ComfyUI's configuration.
        settings: those of the diffusion model.
        latents: the shape of latents of one sample; the last number is the size.
        masks_text: whether it needs a mask of the prompt's tokens.
    """

    config: str
    settings: dict[str, Any]
    latents: Callable[[int], tuple[int, ...]]
    masks_text: bool = False


_FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": POOLED,
    "context_in_dim": TEXT,
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "qkv_bias": True,
    "guidance_embed": True,
}
FAMILIES = {
    "Wan": Family(
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "dim": 64,
            "ffn_dim": 128,
            "freq_dim": 32,
            "text_dim": TEXT,
            "num_heads": 2,
            "num_layers": 2,
        },
        lambda size: (1, 16, 2, size, size),
    ),
    "Flux": Family(
        "Flux",
        {**_FLUX, "image_model": "flux", "theta": 10000, "patch_size": 2},
        lambda size: (1, 16, size, size),
    ),
    "SD3": Family(
        "SD3",
        {
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "depth": 2,
            "input_size": None,
            "adm_in_channels": POOLED,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": TEXT, "out_features": 128},
            },
            "num_patches": 256,
            "pos_embed_max_size": 16,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
        },
        lambda size: (1, 16, size, size),
    ),
    "LTX": Family(
        "LTXV",
        {
            "image_model": "ltxv",
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "cross_attention_dim": 64,
            "caption_channels": TEXT,
        },
        lambda size: (1, 128, 2, size // 2, size // 2),
        masks_text=True,
    ),
    "HunyuanVideo": Family(
        "HunyuanVideo",
        {
            **_FLUX,
            "image_model": "hunyuan_video",
            "theta": 256,
            "patch_size": [1, 2, 2],
            "byt5": False,
            "meanflow": False,
        },
        lambda size: (1, 16, 2, size, size),
    ),
}


class ComfyHost:
    """Makes models and runs samplers, as tests ask.

    Attributes:
        version: of ComfyUI.
        nests: whether a run of a model may be within another one: its patcher knows of one alone.
    """

    samplers = ("euler", "heun", "dpm_2")
    nests = False

    def __init__(self, folder: str | Path) -> None:
        sys.path.insert(0, str(folder))
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        import comfy.lora
        import comfy.model_patcher
        import comfy.sample
        import comfy.samplers
        import comfy.supported_models
        from comfyui_version import __version__

        self.comfy, self.version = comfy, __version__

    def make(self, seed: int = 0, family: str = "Flux") -> Any:
        """Returns the patcher of a new model."""
        kind = FAMILIES[family]
        config = getattr(self.comfy.supported_models, kind.config)(kind.settings)
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device="cpu")
        _fill(model.diffusion_model, seed)
        model.family = kind
        cpu = torch.device("cpu")
        return self.comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)

    def context(self, seed: int, tokens: int = 5) -> Tensor:
        """Returns the tokens of a prompt."""
        return torch.randn(1, tokens, TEXT, generator=torch.Generator().manual_seed(seed))

    def with_lora(self, patcher: Any) -> Any:
        """Returns a clone of a patcher that changes some weights."""
        clone = patcher.clone()
        keys = [k for k in clone.model.state_dict() if k.endswith("weight")][:4]
        state = clone.model.state_dict()
        clone.add_patches({key: ("diff", (torch.full_like(state[key], 0.02),)) for key in keys})
        return clone

    def unload(self, patcher: Any) -> None:
        """Does what ComfyUI does with a model whose memory it needs."""
        for callback in patcher.get_all_callbacks("on_detach_after"):
            callback(patcher, True)

    def sample(
        self,
        patcher: Any,
        sampler: Any = "euler",
        steps: int = 12,
        cfg: float = 1.0,
        seed: int = 0,
        size: int = 8,
        prompt: int = 1,
        positive: list[dict[str, Any]] | None = None,
        callback: Callable[[int], None] | None = None,
        splits: bool = False,
    ) -> Tensor:
        """Runs a sampler, by its name or as a function of k-diffusion's form; returns latents.

        `positive`: conditions, each a dictionary with `context`; `splits`: whether each condition
        is a call of its own, as when memory is short.
        """
        comfy, cpu = self.comfy, torch.device("cpu")
        latent = torch.zeros(patcher.model.family.latents(size))
        noise = comfy.sample.prepare_noise(latent, seed)
        given = positive or [{"context": self.context(prompt)}]
        masks = patcher.model.family.masks_text
        conds = [self._condition(each, masks) for each in given]
        negative = [self._condition({"context": self.context(0)}, masks)]
        kept = comfy.samplers.can_concat_cond
        if splits:
            comfy.samplers.can_concat_cond = lambda a, b: a is b
        try:
            with torch.inference_mode():
                ksampler = comfy.samplers.KSampler(
                    patcher, steps=steps, device=cpu, sampler="euler", scheduler="simple"
                )
                found = (
                    comfy.samplers.sampler_object(sampler)
                    if isinstance(sampler, str)
                    else comfy.samplers.KSAMPLER(sampler)
                )
                return comfy.sample.sample_custom(
                    patcher,
                    noise,
                    cfg,
                    found,
                    ksampler.sigmas,
                    conds,
                    negative,
                    latent,
                    callback=lambda i, *_: callback(i) if callback else None,
                    disable_pbar=True,
                    seed=seed,
                ).clone()
        finally:
            comfy.samplers.can_concat_cond = kept

    def restart(
        self, model: Any, x: Tensor, sigmas: Tensor, callback: Any = None, **kw: Any
    ) -> Tensor:
        """Moves latents half of the way, back by some steps, and on to the end."""
        euler, middle = self.comfy.k_diffusion.sampling.sample_euler, len(sigmas) // 2
        x = euler(model, x, sigmas[: middle + 1], callback=callback, **kw)
        return euler(model, x + 0.1, sigmas[middle - 2 :], callback=callback, **kw)

    def _condition(self, given: dict[str, Any], masks: bool) -> list[Any]:
        """Returns a condition in ComfyUI's form."""
        rest = {k: v for k, v in given.items() if k not in ("context", "area")}
        pooled = torch.ones(1, POOLED) * given["context"].mean()
        if "area" in given:
            rest["area"] = (given["area"], 8, 0, 0)
        mask = torch.ones(given["context"].shape[:2], dtype=torch.long) if masks else None
        return [given["context"], {"pooled_output": pooled, "attention_mask": mask, **rest}]


def _fill(model: nn.Module, seed: int) -> None:
    """Gives all weights values at which outputs depend on all inputs, and change smoothly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in (*model.named_parameters(), *model.named_buffers()):
            if not weight.is_floating_point():
                continue
            if weight.ndim > 1:
                fan_in = weight[0].numel()
                weight.normal_(0, 0.5 * fan_in**-0.5, generator=generator)
            else:
                weight.normal_(0, 0.1, generator=generator)
                if "norm" in name and "bias" not in name:
                    weight += 1
    model.requires_grad_(False)
