"""Sets up the caches of diffusers, and cache-dit, over their documented ranges, for demo models.

They run as their documentation says, in eager mode. What a peer does not support raises its own
error, which becomes its row.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from caches import Clock, calibrate_mag_cache, with_cache
from case import Ready
from diffusers import hooks
from pairs import complete_blocks, is_paired, pair_blocks
from pareto_methods import Choice, Method, choose_best
from pareto_setups import Loop, Setup, Subject
from skips import Pattern, find_patterns

SPATIAL = r"^transformer_blocks\.\d+\.attn1?$"
TEMPORAL = r"^temporal_transformer_blocks\.\d+\.attn1$"
CROSS = r"^transformer_blocks\.\d+\.attn2$"
"""Names of attentions of Latte, and of the joint attention of SD3."""
PAB_RANGES = ((2, 4, 6), (2, 3, 6), (2, 2, 2), (3, 6, 9), (4, 6, 8))
PAB_WINDOWS = ((100, 800), (100, 950), (0, 1000))
FASTER_RANGES = ((2, 5), (2, 3), (3, 5), (2, 2))
"""Ranges of attentions and of the unconditional branch."""
FASTER_FROM = (641, 781, 950)
THRESHOLDS = tuple(0.01 * 1.6**i for i in range(11))
"""From 0.01 to 1.1, around the documented 0.05 of FirstBlockCache and 0.06 of MagCache."""
MAG_SKIPS = (2, 3, 5)


@dataclass(frozen=True)
class Peer:
    """The model of a peer, and how it is called."""

    model: Any
    is_pair: bool = False

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model; one whose blocks are in pairs without its temporal ones."""
        more = {"enable_temporal_attentions": False} if self.is_pair else {}
        return self.model(*args, **kwargs, **more)


def copy_model(loop: Loop) -> Peer:
    """Returns a copy of the model, without what other peers have changed."""
    return Peer(complete_blocks(copy.deepcopy(loop.model.transformer)))


def copy_paired(loop: Loop) -> Peer:
    """Returns a copy with Latte's blocks in pairs, which caches of blocks can follow."""
    model = pair_blocks(copy_model(loop).model, loop.clips.noise.shape[2])
    return Peer(model, is_paired(model))


def enable(peer: Peer, config: Any) -> Ready:
    """Enables a cache on a model."""
    ready = with_cache(peer.model, config)
    ready.call = peer.call
    return ready


def choose_pab(subject: Subject, setup: Setup, computed: int) -> list[Choice]:
    """Returns settings of Pyramid Attention Broadcast: ranges and windows of timesteps."""
    names = {name for name, _ in subject.model.transformer.named_modules()}
    has_temporal = any("temporal" in name for name in names)

    def make(ranges: tuple[int, ...], window: tuple[int, int]) -> Choice:
        kinds = {"spatial": SPATIAL, "temporal": TEMPORAL, "cross": CROSS}
        used = dict(zip(kinds, ranges, strict=True)) if has_temporal else {"spatial": ranges[0]}
        options: dict[str, Any] = {}
        for kind, every in used.items():
            options[f"{kind}_attention_block_skip_range"] = every
            options[f"{kind}_attention_timestep_skip_range"] = window
            options[f"{kind}_attention_block_identifiers"] = (kinds[kind],)

        def prepare(loop: Loop) -> Ready:
            return enable(copy_model(loop), hooks.PyramidAttentionBroadcastConfig(**options))

        shown = "/".join(map(str, used.values()))
        return Choice(f"ranges {shown}, timesteps {window[0]} to {window[1]}", prepare)

    ranges = PAB_RANGES if has_temporal else tuple(dict.fromkeys((r[0],) * 3 for r in PAB_RANGES))
    return [make(*each) for each in itertools.product(ranges, PAB_WINDOWS)]


def choose_faster_cache(subject: Subject, setup: Setup, computed: int) -> list[Choice]:
    """Returns settings of FasterCache: ranges of attentions and of the unconditional branch."""
    names = [name for name, _ in subject.model.transformer.named_modules()]
    has_temporal = any("temporal" in name for name in names)

    def make(ranges: tuple[int, int], start: int) -> Choice:
        def prepare(loop: Loop) -> Ready:
            config = hooks.FasterCacheConfig(
                spatial_attention_block_skip_range=ranges[0],
                spatial_attention_timestep_skip_range=(-1, start),
                temporal_attention_block_skip_range=ranges[0] if has_temporal else None,
                temporal_attention_timestep_skip_range=(-1, start),
                unconditional_batch_skip_range=ranges[1],
                unconditional_batch_timestep_skip_range=(-1, start),
                attention_weight_callback=lambda _: 0.3,
                tensor_format="BCFHW" if loop.clips.noise.dim() == 5 else "BCHW",
                _unconditional_conditional_input_kwargs_identifiers=[
                    "hidden_states",
                    "encoder_hidden_states",
                    "timestep",
                    "pooled_projections",
                ],
            )
            return enable(copy_model(loop), config)

        about = f"attentions {ranges[0]}, guidance {ranges[1]}, from timestep {start}"
        return Choice(about, prepare)

    return [make(*each) for each in itertools.product(FASTER_RANGES, FASTER_FROM)]


def choose_first_block_cache(subject: Subject, setup: Setup, computed: int) -> list[Choice]:
    """Returns settings of FirstBlockCache: thresholds."""

    def make(threshold: float) -> Choice:
        config = hooks.FirstBlockCacheConfig(threshold=threshold)
        return Choice(f"threshold {threshold:.3g}", lambda loop: enable(copy_paired(loop), config))

    return list(map(make, THRESHOLDS))


def choose_mag_cache(subject: Subject, setup: Setup, computed: int) -> list[Choice]:
    """Returns settings of MagCache, calibrated: thresholds and most calls skipped in a row."""
    calls = subject.loop(setup, subject.seen).num_calls

    def calibrate() -> list[float]:
        loop = subject.loop(setup, subject.seen)
        peer = copy_paired(loop)

        def generate(ready: Ready) -> None:
            loop.run(peer.call, ready.on_step)  # type: ignore[arg-type]

        return calibrate_mag_cache(peer.model, calls, generate)

    ratios = subject.keep(setup, "ratios of MagCache", calibrate)

    def make(threshold: float, limit: int) -> Choice:
        config = hooks.MagCacheConfig(
            threshold=threshold,
            max_skip_steps=limit,
            num_inference_steps=calls,
            mag_ratios=ratios,
        )
        about = f"threshold {threshold:.3g}, at most {limit} skipped"
        return Choice(about, lambda loop: enable(copy_paired(loop), config))

    return [make(*each) for each in itertools.product(THRESHOLDS[1::2], MAG_SKIPS)]


def choose_taylorseer(subject: Subject, setup: Setup, computed: int) -> list[Choice]:
    """Returns settings of TaylorSeer in lite mode with exactly as many computed calls."""
    calls = subject.loop(setup, subject.seen).num_calls

    def make(pattern: Pattern, order: int) -> Choice:
        config = hooks.TaylorSeerCacheConfig(
            use_lite_mode=True,
            cache_interval=pattern.interval,
            disable_cache_before_step=pattern.warm_up,
            disable_cache_after_step=pattern.end,
            max_order=order,
            taylor_factors_dtype=torch.float32,
        )
        return Choice(
            f"{pattern}, order {order}", lambda loop: enable(copy_model(loop), config), computed
        )

    patterns = find_patterns(calls, computed)
    return [make(*each) for each in itertools.product(patterns, (1, 2))]


def choose_cache_dit(subject: Subject, setup: Setup, computed: int) -> list[Choice]:
    """Returns settings of cache-dit's DBCache, alone and with its TaylorSeer: thresholds, one block
    always computed.

    It takes transformers outside of pipelines by a description of their blocks.
    """
    import cache_dit

    def make(threshold: float, order: int) -> Choice:
        def prepare(loop: Loop) -> Ready:
            peer = copy_paired(loop)
            pattern = cache_dit.ForwardPattern
            adapter = cache_dit.BlockAdapter(
                transformer=peer.model,
                blocks=peer.model.transformer_blocks,
                forward_pattern=pattern.Pattern_3 if peer.is_pair else pattern.Pattern_1,
                check_forward_pattern=False,
            )
            config = cache_dit.DBCacheConfig(
                num_inference_steps=loop.num_calls,
                max_warmup_steps=min(8, loop.num_calls // 3),
                Fn_compute_blocks=1,
                residual_diff_threshold=threshold,
            )
            taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
            cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=taylor)
            return Ready(peer.call, Clock().on_step)

        about = f", TaylorSeer of order {order}" if order else ""
        return Choice(f"F1B0, threshold {threshold:.3g}{about}", prepare)

    return [make(*each) for each in itertools.product(THRESHOLDS[1:], (0, 1, 2))]


def _iterate() -> Iterator[Method]:
    makers: dict[str, tuple[str, Callable[..., list[Choice]]]] = {
        "PAB": ("diffusers' Pyramid Attention Broadcast", choose_pab),
        "FasterCache": ("diffusers' FasterCache", choose_faster_cache),
        "FirstBlockCache": ("diffusers' FirstBlockCache", choose_first_block_cache),
        "MagCache": ("diffusers' MagCache, calibrated", choose_mag_cache),
        "TaylorSeer": ("diffusers' TaylorSeer, lite mode", choose_taylorseer),
        "cache-dit": ("cache-dit's DBCache", choose_cache_dit),
    }
    for name, (about, make) in makers.items():
        yield Method(name, about, choose_best(name, make))


PEERS = tuple(_iterate())
"""The methods that others offer as code."""
