"""Compares each phase with a module written by hand for it: does reuse save all that it could?

    python bench/efficiency.py --out bench/results/efficiency.json

The 2/4/6 pyramid over the middle 70 % of 30 steps, on the demo's model and on a Latte that takes a
tenth of a second a step or more. The handwritten module of a phase computes only what is necessary:
a reused branch is the stored tensor times its gate, without norm, modulation, projections or
attention; keys and values of the text are computed once per generation. torch.compile compiles each
module as one graph.

All variants run the same steps in turn, in an order that rotates. A row is a phase: seconds of a
step, medians over steps and rounds, and the median of the ratios of adjacent runs. pabc's seconds
are those of the whole call, guards included; those of the handwritten module include Dynamo's
guards. The first step of a generation, which projects the text, is left out. Outputs are compared
before anything is timed.

The ratio in question is that of pabc without the stages that replace formulas and matrix products,
so that both sides run the same ops and differ in the work that reuse leaves; `as shipped` is with
these stages.

A second table is about calls that are skipped as a whole: see `bench/skipped_calls.py`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import skipped_calls
import torch
import workloads
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import pabc
from pabc.plan import Phase, Plan

MODELS = ("demo", "latte")
PARTS = ("phases", "skips")
OTHER_OPS = ("formulas", "onednn")
"""The stages without which pabc compiles the model's own formulas and PyTorch's own products."""
NUM_STEPS = 30
AIM = 1.05
TOLERANCE = 1e-4
Name = tuple[str, int]
"""A region: its kind, and the number of its block."""


class LattePhase(nn.Module):
    """diffusers' Latte in one phase, written by hand: it reads reused values and does nothing more.

    B clips, T frames, S tokens of a frame, L text tokens, D channels, H heads.
    """

    def __init__(self, model: Any, plan: Plan, phase: Phase) -> None:
        super().__init__()
        self.model = model
        self.reused = tuple(name_slot(plan, slot) for slot in phase.reused)
        self.stored = tuple(name_slot(plan, slot) for slot in phase.stored)

    def forward(
        self, latents: Tensor, timestep: Tensor, texts: Sequence[Tensor], cuts: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Maps latents [B, C, T, h, w], each cross attention's keys and values [B, L, D] and the
        reused values to the prediction and the values to store."""
        model, held, kept = self.model, dict(zip(self.reused, cuts, strict=True)), {}

        def branch(name: Name, compute: Any) -> Tensor:
            if name in held:
                return held[name]
            kept[name] = compute()
            return kept[name]

        batch, channels, frames, height, width = latents.shape
        x = latents.transpose(1, 2).reshape(-1, channels, height, width)
        x = model.pos_embed(x)
        tokens = x.shape[1]
        t_BD6, t_BD = model.adaln_single(
            timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            batch_size=batch,
            hidden_dtype=x.dtype,
        )
        times = t_BD6.view(batch, 1, 6, -1)
        pairs = zip(model.transformer_blocks, model.temporal_transformer_blocks, strict=True)
        for i, (spatial, temporal) in enumerate(pairs):
            mods = spatial.scale_shift_table + times.expand(-1, frames, -1, -1).flatten(0, 1)
            keys, values = (t.repeat_interleave(frames, 0) for t in texts[2 * i : 2 * i + 2])
            x = x + mods[:, 2:3] * branch(
                ("spatial", i), lambda b=spatial, m=mods, x=x: attend_self(b, x, m)
            )
            x = x + branch(
                ("cross", i),
                lambda b=spatial, x=x, k=keys, v=values: attend(b.attn2, b.attn2.to_q(x), k, v),
            )
            x = feed(spatial, x, mods)
            x = x.view(batch, frames, tokens, -1).transpose(1, 2).reshape(-1, frames, x.shape[-1])
            if i == 0 and frames > 1:
                x = x + model.temp_pos_embed
            mods = temporal.scale_shift_table + times.expand(-1, tokens, -1, -1).flatten(0, 1)
            x = x + mods[:, 2:3] * branch(
                ("temporal", i), lambda b=temporal, m=mods, x=x: attend_self(b, x, m)
            )
            x = feed(temporal, x, mods)
            x = x.view(batch, tokens, frames, -1).transpose(1, 2).reshape(-1, tokens, x.shape[-1])
        ends = (model.scale_shift_table + t_BD[:, None]).repeat_interleave(frames, 0)
        x = model.proj_out(modulate(model.norm_out(x), ends[:, :1], ends[:, 1:]))
        patch, out = model.config.patch_size, model.out_channels
        rows, columns = height // patch, width // patch
        x = x.view(batch, frames, rows, columns, patch, patch, out).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(batch, out, frames, height, width), [kept[name] for name in self.stored]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shifts and scales a normalized input."""
    return x * (1 + scale) + shift


def attend_self(block: Any, x: Tensor, mods: Tensor) -> Tensor:
    """Returns the branch of a self-attention, before its gate."""
    attn, x = block.attn1, modulate(block.norm1(x), mods[:, :1], mods[:, 1:2])
    return attend(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))


def attend(attn: Any, *qkv: Tensor) -> Tensor:
    """Returns the attention of projected tokens, after the output projection."""
    q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in qkv)
    return attn.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def feed(block: Any, x: Tensor, mods: Tensor) -> Tensor:
    """Returns the input plus the branch of the MLP."""
    return x + mods[:, 5:] * block.ff(modulate(block.norm2(x), mods[:, 3:4], mods[:, 4:5]))


def name_slot(plan: Plan, slot: int) -> Name:
    """Returns the region of a slot."""
    return plan.slots[slot].kind, plan.slots[slot].layer


class ByHand:
    """Runs the steps of a plan with a module for each phase."""

    def __init__(self, model: Any, plan: Plan) -> None:
        self._model, self._plan = model, plan
        phases = [LattePhase(model, plan, phase) for phase in plan.phases]
        # All modules share one forward; Dynamo needs room for one compilation per phase.
        torch._dynamo.config.recompile_limit = max(8, 2 * len(phases))
        self._phases = [torch.compile(phase, fullgraph=True, dynamic=False) for phase in phases]
        self._held: dict[int, Tensor] = {}
        self._texts: list[Tensor] = []

    def __call__(self, step: int, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        """Runs a step; step 0 begins a generation."""
        if step == 0:
            text = self._model.caption_projection(text)
            blocks = self._model.transformer_blocks
            self._texts = [
                to(text) for block in blocks for to in (block.attn2.to_k, block.attn2.to_v)
            ]
        index = int(self._plan.phase_of_step[step])
        phase = self._plan.phases[index]
        cuts = [self._held[slot] for slot in phase.reused]
        output, kept = self._phases[index](latents, timestep, self._texts, cuts)
        for slot, cut in zip(phase.stored, kept, strict=True):
            if self._plan.until[step, slot] >= 0:
                self._held[slot] = cut
        for slot in self._plan.frees[step]:
            self._held.pop(slot, None)
        return output


def measure(workload: workloads.Workload, rounds: int) -> dict[str, Any]:
    """Returns the rows of one model."""
    model = workloads.build(workload)
    timesteps = workloads.timesteps(workload, NUM_STEPS)
    schedule = pabc.Schedule.pyramid(timesteps, **workload.ranges, fraction=workloads.FRACTION)
    fast = pabc.compile(model, schedule)
    plain = pabc.compile(model, schedule, disable=OTHER_OPS)
    start = workloads.draw(workload, 0)
    latents = torch.cat([start.latents] * 2)
    calls = [
        workload.call(latents, torch.full((len(latents),), t, dtype=torch.long), start.text)
        for t in map(int, timesteps)
    ]

    def run_shipped(step: int) -> Tensor:
        return first_of(fast(**calls[step]))

    def run_plain(step: int) -> Tensor:
        return first_of(plain(**calls[step]))

    fast.prepare(**calls[0])
    plain.prepare(**calls[0])
    by_hand = ByHand(model, fast.plan)

    def run_by_hand(step: int) -> Tensor:
        call = calls[step]
        return by_hand(step, call["hidden_states"], call["timestep"], call["encoder_hidden_states"])

    errors = []
    for step in range(NUM_STEPS):
        expected = run_by_hand(step)
        for run in (run_plain, run_shipped):
            errors.append(((run(step) - expected).abs().max() / expected.abs().max()).item())
    if max(errors) > TOLERANCE:
        raise RuntimeError(
            f"outputs: expected equal ones, found a relative error of {max(errors):g}"
        )
    seconds = time_steps((run_plain, run_by_hand, run_shipped), rounds)
    rows = []
    for phase in fast.plan.phases:
        found = [each for step in phase.steps if step for each in seconds[step]]
        rows.append(
            {
                "phase": phase.index,
                "steps": len(phase.steps),
                "reused": count_kinds(fast.plan, phase),
                "pabc": report.summarize([plain for plain, _, _ in found], 6),
                "by_hand": report.summarize([hand for _, hand, _ in found], 6),
                "shipped": report.summarize([shipped for _, _, shipped in found], 6),
                "ratio": round(statistics.median(plain / hand for plain, hand, _ in found), 4),
            }
        )
    return {"model": workload.name, **workload.shapes, "max_error": max(errors), "phases": rows}


def first_of(output: Any) -> Tensor:
    """Returns the prediction in a model's result."""
    found = output[0] if isinstance(output, tuple) else output.sample
    assert isinstance(found, Tensor)
    return found


def time_steps(runs: Sequence[Any], rounds: int) -> list[list[tuple[float, ...]]]:
    """Returns the seconds of each of `runs` per step and round; their order rotates."""
    found: list[list[tuple[float, ...]]] = [[] for _ in range(NUM_STEPS)]
    for turn in range(rounds):
        for step in range(NUM_STEPS):
            seconds = [0.0] * len(runs)
            order = list(range(len(runs)))
            first = (turn + step) % len(order)
            for i in order[first:] + order[:first]:
                start = time.perf_counter()
                runs[i](step)
                seconds[i] = time.perf_counter() - start
            found[step].append(tuple(seconds))
    return found


def count_kinds(plan: Plan, phase: Phase) -> dict[str, int]:
    """Returns the number of regions of each kind that a phase reuses."""
    kinds = [plan.slots[slot].kind for slot in phase.reused]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def format_model(model: dict[str, Any]) -> str:
    """Returns the table of one model."""
    rows = [
        (
            model["model"],
            row["phase"],
            row["steps"],
            ", ".join(f"{n} {kind}" for kind, n in row["reused"].items()) or "nothing",
            report.format_spread(row["pabc"], 4),
            report.format_spread(row["by_hand"], 4),
            report.format_spread(row["shipped"], 4),
            f"{row['ratio']:.3f}{'' if row['ratio'] <= AIM else ' !'}",
        )
        for row in model["phases"]
    ]
    header = (
        "model",
        "phase",
        "steps",
        "reused",
        "pabc, s",
        "by hand, s",
        "as shipped, s",
        "ratio",
    )
    error = f"largest relative error {model['max_error']:.1e}"
    return f"{report.format_table(header, rows)}\n{error}"


def main() -> None:
    """Measures all models; prints a table, and writes JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    content: dict[str, Any] = {**report.describe_run(), "rounds": options.rounds}
    sizes = workloads.TINY if options.tiny else workloads.SMALL
    for name in options.models:
        with torch.no_grad():
            if "phases" in options.parts:
                content.setdefault("models", []).append(measure(sizes[name], options.rounds))
                print(format_model(content["models"][-1]), flush=True)
            if "skips" in options.parts:
                rows = skipped_calls.measure(sizes[name], NUM_STEPS, options.rounds)
                content.setdefault("skips", []).extend(rows)
                print(skipped_calls.format_rows(rows), flush=True)
    if options.out is not None:
        report.write_json(options.out, content)


if __name__ == "__main__":
    main()
