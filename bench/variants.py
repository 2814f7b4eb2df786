"""Ways to run a model in a sampling loop: as it is, compiled, with each cache there is, with pabc.

A peer's row is the peer's own code, set up as its documentation says: where that leaves a choice,
the comment beside it says which was made. Whatever a peer raises is its row.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import diffusers
import torch
from diffusers import hooks
from torch import Tensor, nn
from workloads import OnStep, Start, Workload, denoise, no_context

import pabc


@dataclass(frozen=True)
class Case:
    """What a variant is made for: a model of its own, and the loop that it will run in."""

    workload: Workload
    model: nn.Module
    start: Start
    schedule: pabc.Schedule

    @property
    def num_steps(self) -> int:
        """Of the loop."""
        return self.schedule.num_steps

    @property
    def example(self) -> dict[str, Any]:
        """The arguments of the first call."""
        latents = torch.cat([self.start.latents] * 2)
        scheduler = self.workload.scheduler()
        scheduler.set_timesteps(self.num_steps, device=latents.device)
        when = scheduler.timesteps[0].expand(len(latents))
        return self.workload.call(latents, when, self.start.text)

    @property
    def window(self) -> tuple[float, float]:
        """The schedule's window in timesteps, both bounds strict: halfway to the steps outside."""
        steps = self.schedule.timesteps
        reused = [i for kind in self.workload.ranges for i, r in enumerate(self._mask(kind)) if r]
        inside = range(min(reused, default=0), max(reused, default=-1) + 1)
        high = steps[inside.start - 1] if inside.start else float("inf")
        low = steps[inside.stop] if inside.stop < len(steps) else float("-inf")
        return low, high

    def _mask(self, kind: str) -> tuple[bool, ...]:
        return self.schedule.mask(kind)


@dataclass
class Ready:
    """A model that can be sampled.

    Attributes:
        call: is called in the model's place.
        on_step: is entered around each step.
        on_end: is called after each generation.
        note: what a reader of the row should know.
    """

    call: Callable[..., Any]
    on_step: OnStep = no_context
    on_end: Callable[[], None] = lambda: None
    note: str = ""


@dataclass(frozen=True)
class Variant:
    """One row. `follows_schedule`: it computes what pabc's plan computes, and nothing else."""

    name: str
    about: str
    prepare: Callable[[Case], Ready]
    follows_schedule: bool = False


def run_eager(case: Case) -> Ready:
    """The model as it is."""
    return Ready(case.model)


def run_torch_compile(case: Case) -> Ready:
    """The whole model in one graph; with graph breaks where that is refused."""
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
    """pabc; every phase is prepared."""

    def prepare(case: Case) -> Ready:
        fast = pabc.compile(case.model, case.schedule, backend=backend)  # type: ignore[arg-type]
        fast.prepare(**case.example)
        return Ready(fast, on_end=fast.reset)

    return prepare


@dataclass
class Clock:
    """What a pipeline's `current_timestep` is: set by its loop, read by hooks."""

    timestep: Tensor | None = None
    model: Any = None

    @contextlib.contextmanager
    def on_step(self, index: int, timestep: Tensor) -> Iterator[None]:
        """As pipelines do: both branches of guidance are one call."""
        self.timestep = timestep
        where = {"step_index": index, "timestep": timestep}
        model = self.model
        with model.cache_context("cond_uncond", **where) if model else contextlib.nullcontext():
            yield


def with_cache(case: Case, config: Any, note: str = "") -> Ready:
    """A cache of diffusers'. A model that is not diffusers' is given its mixin, as theirs have."""
    model: Any = case.model
    if not isinstance(model, diffusers.CacheMixin):
        model.__class__ = type(type(model).__name__, (type(model), diffusers.CacheMixin), {})
    clock = Clock(model=model)
    if "current_timestep_callback" in {f.name for f in fields(config)}:
        config.current_timestep_callback = lambda: clock.timestep
    model.enable_cache(config)
    return hooked(model, clock, note)


def hooked(model: nn.Module, clock: Clock, note: str = "") -> Ready:
    """A model whose modules have hooks; they are reset where a pipeline resets them."""
    registry = hooks.HookRegistry.check_if_exists_or_initialize(model)
    return Ready(model, clock.on_step, registry.reset_stateful_hooks, note)


def run_diffusers_pab(case: Case) -> Ready:
    """diffusers' Pyramid Attention Broadcast: the same ranges and window, kinds told by name."""
    if not isinstance(case.model, diffusers.CacheMixin):
        return _hook_pab_by_name(case)
    ranges = {**case.workload.ranges}
    if "joint" in ranges:  # which diffusers counts among the spatial ones
        ranges["spatial"] = ranges.pop("joint")
    options: dict[str, Any] = {}
    for kind in ("spatial", "temporal", "cross"):
        if kind in ranges:
            options[f"{kind}_attention_block_skip_range"] = ranges[kind]
            options[f"{kind}_attention_timestep_skip_range"] = case.window
            options[f"{kind}_attention_block_identifiers"] = (case.workload.names[kind],)
    config = hooks.PyramidAttentionBroadcastConfig(**options)
    return with_cache(case, config, "kinds stated by name; its own names tell Latte's wrongly")


def _hook_pab_by_name(case: Case) -> Ready:
    """The same hook, on the attentions of a model that diffusers does not know."""
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
    """The threshold of its documentation."""
    config = hooks.FirstBlockCacheConfig(threshold=0.2)
    return with_cache(case, config)


def run_taylorseer(case: Case) -> Ready:
    """The settings of its documentation."""
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=5,
        max_order=1,
        disable_cache_before_step=min(10, case.num_steps // 3),
        taylor_factors_dtype=torch.bfloat16,
        # Its own patterns match the whole name, and so none of these models' attentions.
        cache_identifiers=[pattern.strip("^$") for pattern in case.workload.names.values()],
    )
    return with_cache(case, config, "identifiers stated")


def run_mag_cache(case: Case) -> Ready:
    """Calibrated on this loop, as its documentation says, then its own settings."""
    options = {"num_inference_steps": case.num_steps}
    calibrated = with_cache(case, hooks.MagCacheConfig(calibrate=True, **options))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        denoise(case.workload, calibrated.call, case.start, case.num_steps, calibrated.on_step)
    found = re.search(r"^\[[\d., e+-]+\]$", printed.getvalue(), re.MULTILINE)
    if found is None:
        raise RuntimeError("calibration printed nothing: no list of blocks has a name it knows")
    calibrated.on_end()
    calibrated.call.disable_cache()  # type: ignore[attr-defined]
    config = hooks.MagCacheConfig(mag_ratios=ast.literal_eval(found[0]), **options)
    return with_cache(case, config)


def run_faster_cache(case: Case) -> Ready:
    """The settings of its documentation for CogVideoX; temporal attentions as spatial ones."""
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
    return with_cache(case, config, note)


def run_cache_dit(case: Case) -> Ready:
    """Its own adapter for the model; 8 blocks always computed, or 1 where there are few."""
    try:
        import cache_dit
    except ImportError as error:
        raise ImportError("not installed: pip install cache-dit") from error
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
    """The same, its model given to torch.compile after that, as diffusers' documentation says."""

    def prepare_compiled(case: Case) -> Ready:
        ready = prepare(case)
        ready.call = torch.compile(case.model)
        return ready

    return prepare_compiled


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= 160 else text[:157] + "..."


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
    )
}
