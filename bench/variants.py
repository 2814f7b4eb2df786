"""Sets up ways to run a model in a sampling loop: eager, compiled, with other caches, with pabc.

A peer's row runs the peer's own code, set up as its documentation says; a comment names the choice
where the documentation leaves one. If a peer raises an error, the error is its row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import skips
import torch
from caches import Clock, calibrate_mag_cache, hooked, with_cache
from case import Case, Ready, first_line
from diffusers import hooks
from torch import Tensor

import pabc


@dataclass(frozen=True)
class Variant:
    """A variant, which is a row of the table.

    Attributes:
        name: its name.
        about: a description for readers.
        prepare: makes it ready for sampling.
        follows_schedule: True if it computes exactly what pabc's plan computes.
        skips_calls: True if it computes as many calls as the case says, and skips the others.
    """

    name: str
    about: str
    prepare: Callable[[Case], Ready]
    follows_schedule: bool = False
    skips_calls: bool = False


def run_eager(case: Case) -> Ready:
    """Prepares the model as it is."""
    return Ready(case.model)


def run_torch_compile(case: Case) -> Ready:
    """Compiles the whole model as one graph, or with graph breaks if that fails."""
    whole = torch.compile(case.model, fullgraph=True)
    try:
        with torch.no_grad():
            whole(**case.example)
    except Exception as error:
        torch._dynamo.reset()
        note = f"not in one graph: {first_line(error)}"
        return Ready(torch.compile(case.model), note=note)
    return Ready(whole)


def run_pabc(backend: str) -> Callable[[Case], Ready]:
    """Compiles the model with pabc, including all phases."""

    def prepare(case: Case) -> Ready:
        fast = pabc.compile(case.model, case.schedule, backend=backend)  # type: ignore[arg-type]
        fast.prepare(**case.example)
        return Ready(fast, on_end=fast.reset)

    return prepare


def run_diffusers_pab(case: Case) -> Ready:
    """Enables diffusers' Pyramid Attention Broadcast, with the same ranges and window."""
    if not isinstance(case.model, diffusers.CacheMixin):
        return _hook_pab_by_name(case)
    ranges = {**case.workload.ranges}
    if "joint" in ranges:  # diffusers treats joint attention as spatial
        ranges["spatial"] = ranges.pop("joint")
    options: dict[str, Any] = {}
    for kind in ("spatial", "temporal", "cross"):
        if kind in ranges:
            options[f"{kind}_attention_block_skip_range"] = ranges[kind]
            options[f"{kind}_attention_timestep_skip_range"] = case.window
            options[f"{kind}_attention_block_identifiers"] = (case.workload.names[kind],)
    config = hooks.PyramidAttentionBroadcastConfig(**options)
    return with_cache(
        case.model, config, "kinds stated by name; its own names tell Latte's wrongly"
    )


def _hook_pab_by_name(case: Case) -> Ready:
    """Adds diffusers' hook to the attentions of a model that diffusers does not support."""
    from diffusers.hooks import pyramid_attention_broadcast as pab

    clock = Clock()
    for kind, pattern in case.workload.names.items():
        for name, module in case.model.named_modules():
            if re.search(pattern, name):
                hook = pab.PyramidAttentionBroadcastHook(
                    case.window, case.workload.ranges[kind], lambda: clock.timestep
                )
                registry = hooks.HookRegistry.check_if_exists_or_initialize(module)
                registry.register_hook(hook, "pyramid_attention_broadcast")
    note = "hooks registered by hand: the model's attentions are not diffusers' classes"
    return hooked(case.model, clock, note)


def run_first_block_cache(case: Case) -> Ready:
    """Enables FirstBlockCache with the threshold of its documentation."""
    config = hooks.FirstBlockCacheConfig(threshold=0.2)
    return with_cache(case.model, config)


def run_taylorseer(case: Case) -> Ready:
    """Enables TaylorSeer with the settings of its documentation."""
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=5,
        max_order=1,
        disable_cache_before_step=min(10, case.num_steps // 3),
        taylor_factors_dtype=torch.bfloat16,
        # The default patterns match whole names, and thus none of these models' attentions.
        cache_identifiers=[pattern.strip("^$") for pattern in case.workload.names.values()],
    )
    return with_cache(case.model, config, "identifiers stated")


def run_mag_cache(case: Case) -> Ready:
    """Enables MagCache with its own settings, after the calibration that it documents."""
    ratios = calibrate_mag_cache(case.model, case.num_steps, case.generate)
    config = hooks.MagCacheConfig(mag_ratios=ratios, num_inference_steps=case.num_steps)
    return with_cache(case.model, config)


def run_faster_cache(case: Case) -> Ready:
    """Enables FasterCache as documented for CogVideoX, also for temporal attention."""
    has_temporal = "temporal" in case.workload.names
    doubled = 2 * case.workload.num_clips
    tensors = {name: x for name, x in case.example.items() if isinstance(x, Tensor)}
    is_known = isinstance(case.model, diffusers.CacheMixin)
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        temporal_attention_block_skip_range=2 if has_temporal else None,
        temporal_attention_timestep_skip_range=(-1, 681),
        attention_weight_callback=lambda _: 0.3,
        unconditional_batch_skip_range=5,
        unconditional_batch_timestep_skip_range=(-1, 781),
        tensor_format="BFCHW" if case.workload.frames_first else "BCFHW",
        _unconditional_conditional_input_kwargs_identifiers=[
            name for name, x in tensors.items() if len(x) == doubled
        ],
    )
    note = "" if is_known else "guidance only: the model's attentions are not diffusers' classes"
    return with_cache(case.model, config, note)


def run_cache_dit(case: Case) -> Ready:
    """Enables cache-dit with its adapter for the model; always computes 8 blocks, or 1 of few."""
    try:
        import cache_dit
    except ImportError as error:
        raise ImportError(
            "cache-dit: expected it to be installed; pip install cache-dit"
        ) from error
    num_blocks = len(getattr(case.model, "transformer_blocks", ()))
    few = num_blocks < 16
    config = cache_dit.DBCacheConfig(
        num_inference_steps=case.num_steps,
        max_warmup_steps=min(8, case.num_steps // 3),
        **({"Fn_compute_blocks": 1} if few else {}),
    )
    cache_dit.enable_cache(case.model, cache_config=config)
    note = f"F1B0: {num_blocks} blocks" if few else "F8B0"
    return Ready(case.model, Clock(model=case.model).on_step, note=note)


def compiled(prepare: Callable[[Case], Ready]) -> Callable[[Case], Ready]:
    """Returns the variant with its model compiled afterwards, as diffusers' documentation says."""

    def prepare_compiled(case: Case) -> Ready:
        ready = prepare(case)
        ready.call = torch.compile(case.model)
        return ready

    return prepare_compiled


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("eager", "the model as it is", run_eager),
        Variant("torch.compile", "the whole model, mode default, fullgraph", run_torch_compile),
        Variant("diffusers PAB", "PyramidAttentionBroadcast hooks", run_diffusers_pab, True),
        Variant(
            "diffusers PAB, compiled",
            "the same under torch.compile",
            compiled(run_diffusers_pab),
            True,
        ),
        Variant("pabc eager", "backend='eager', prepared", run_pabc("eager"), True),
        Variant("pabc", "backend='inductor', prepared", run_pabc("inductor"), True),
        Variant("FirstBlockCache", "threshold 0.2", run_first_block_cache),
        Variant("TaylorSeer", "every 5th step, order 1, from step 10", run_taylorseer),
        Variant("MagCache", "calibrated on the same loop, threshold 0.06", run_mag_cache),
        Variant("FasterCache", "guidance and attentions, weight 0.3", run_faster_cache),
        Variant("cache-dit", "DBCache", run_cache_dit),
        Variant("cache-dit, compiled", "the same under torch.compile", compiled(run_cache_dit)),
        *(Variant(name, about, prepare, skips_calls=True) for name, about, prepare in skips.ROWS),
    )
}
