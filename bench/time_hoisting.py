"""Measures hoisted values: their bytes, and the cost of ops that depend on the timestep only.

    python bench/time_hoisting.py --out bench/results/hoisting.json

- `kept`: bytes of hoisted values, with all copies over frames and with only one of them; seconds of
  the prologue and of a step that reuses nothing, in turn. At full size: bytes only.
- `timely`: the share of a step in ops that depend on the timestep and not on the latents; the
  share in one more layer is the limit for deep models.
- `batched`: whether projecting 30 timesteps at once has the same bits as one at a time.

Shapes: B batch, C channels, T frames, H x W latent pixels, N tokens, L text tokens, D width.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import report
import torch
from torch import nn
from torch.fx import Graph, GraphModule

import pabc
from pabc import passes, pipeline
from pabc.demo.digits import CANVAS, FRAMES
from pabc.demo.latte import MAX_TOKENS, TEXT_DIM, load_transformer
from pabc.options import Options
from pabc.passes.hoist import find_invariants
from pabc.passes.ir import copy_into, is_tensor, output_node, user_inputs, value
from pabc.stages import Compilation, run_stages

Call = dict[str, Any]
NUM_STEPS = 30


def make_demo() -> tuple[nn.Module, Call]:
    """Returns the demo's model, and inputs with guidance."""
    return load_transformer(), {
        "hidden_states": torch.randn(2, 1, FRAMES, CANVAS, CANVAS),
        "timestep": torch.tensor([7, 7]),
        "encoder_hidden_states": torch.randn(2, MAX_TOKENS, TEXT_DIM),
    }


def make_latte(
    layers: int = 12,
    heads: int = 6,
    head_dim: int = 32,
    frames: int = 8,
    size: int = 32,
    B: int = 1,
) -> tuple[nn.Module, Call]:
    """Returns Latte with `layers` spatial and `layers` temporal blocks."""
    model = diffusers.LatteTransformer3DModel(
        in_channels=4,
        sample_size=size,
        patch_size=2,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        cross_attention_dim=heads * head_dim,
        caption_channels=4096,
        attention_bias=True,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=frames,
    )
    return model.eval(), {
        "hidden_states": torch.randn(B, 4, frames, size, size),
        "timestep": torch.full((B,), 7),
        "encoder_hidden_states": torch.randn(B, 120, 4096),
    }


def make_dit(layers: int, size: int) -> tuple[nn.Module, Call]:
    """Returns DiT-XL/2 with fewer layers, and inputs with guidance."""
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=layers,
        sample_size=size,
    )
    return model.eval(), {
        "hidden_states": torch.randn(2, 4, size, size),
        "timestep": torch.tensor([7, 7]),
        "class_labels": torch.tensor([1, 1000]),
    }


def make_sd3(layers: int, size: int) -> tuple[nn.Module, Call]:
    """Returns Stable Diffusion 3 with fewer layers, and inputs with guidance."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=size,
        num_layers=layers,
        attention_head_dim=64,
        num_attention_heads=24,
        caption_projection_dim=1536,
    )
    return model.eval(), {
        "hidden_states": torch.randn(2, 16, size, size),
        "encoder_hidden_states": torch.randn(2, 154, 4096),
        "pooled_projections": torch.randn(2, 2048),
        "timestep": torch.tensor([7.0, 7.0]),
    }


def make_flux(layers: int, size: int) -> tuple[nn.Module, Call]:
    """Returns Flux of a third of its width, with fewer layers, two single per double one."""
    model = diffusers.FluxTransformer2DModel(
        num_layers=layers,
        num_single_layers=2 * layers,
        num_attention_heads=8,
        guidance_embeds=True,
    )
    side = torch.arange(size, dtype=torch.float32)
    places = torch.cartesian_prod(torch.zeros(1), side, side)
    return model.eval(), {
        "hidden_states": torch.randn(1, size * size, 64),
        "encoder_hidden_states": torch.randn(1, 128, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": places,
        "txt_ids": torch.zeros(128, 3),
        "guidance": torch.tensor([3.5]),
    }


def make_cogvideox(layers: int, size: int) -> tuple[nn.Module, Call]:
    """Returns CogVideoX-2b with fewer layers, and inputs of four latent frames."""
    model = diffusers.CogVideoXTransformer3DModel(
        num_layers=layers, sample_width=size, sample_height=size, sample_frames=13
    )
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 16, size, size),
        "encoder_hidden_states": torch.randn(1, 226, 4096),
        "timestep": torch.tensor([7]),
    }


def measure_kept(make: Callable[[], tuple[nn.Module, Call]], rounds: int) -> dict[str, Any]:
    """Measures with and without the stage `repeats`, in turn; phases are not compiled."""
    torch.manual_seed(0)
    model, call = make()
    compiled = {}
    for name, disable in (("whole", ("repeats",)), ("one", ())):
        compiled[name] = pabc.compile(
            model,
            pabc.Schedule.none(range(10_000)),
            backend="eager",
            disable=disable,
            example_inputs=((), call),
        )
    first = {name: fast(**call)[0] for name, fast in compiled.items()}
    assert torch.equal(first["whole"], first["one"])
    programs = {name: fast._captured("a benchmark")[0] for name, fast in compiled.items()}
    runs = {f"{name} step": lambda f=fast: f(**call) for name, fast in compiled.items()}
    for name, program in programs.items():
        inputs = [call.get(n) for n in program.signature.inputs]
        runs[f"{name} prologue"] = lambda p=program, i=inputs: p._prologue(*i)
    seconds = time_in_turn(runs, rounds)
    return {
        name: {
            "bytes": count_bytes(program._prologue),
            "prologue_seconds": report.summarize(seconds[f"{name} prologue"], 5),
            "step_seconds": report.summarize(seconds[f"{name} step"], 5),
        }
        for name, program in programs.items()
    }


def measure_full_size() -> dict[str, Any]:
    """Measures bytes of Latte-1: 56 blocks, 16 frames of 512 x 512, guidance, bfloat16."""
    with torch.device("meta"):
        model, call = make_latte(28, 16, 72, 16, 64, B=2)
        model, call = (
            model.bfloat16(),
            {name: t.bfloat16() if t.is_floating_point() else t for name, t in call.items()},
        )
    facts = {
        name: run_to(model, call, last).facts[passes.PrologueGraph]
        for name, last in (("whole", "hoist"), ("one", "repeats"))
    }
    return {name: {"bytes": count_bytes(found.graph)} for name, found in facts.items()}


def run_to(model: nn.Module, call: Call, last: str) -> Compilation:
    """Runs the stages up to and including the one named `last`."""
    stages = (*pipeline.NAMING, *pipeline.GUARDING)
    names = [stage.name for stage in stages]
    start = pipeline.begin_capture(passes.ModelCall(model=model, args=(), kwargs=call))
    return run_stages(stages[: names.index(last) + 1], start, Options())


def count_bytes(prologue: GraphModule) -> int:
    """Returns the bytes of a prologue's results, if none share memory."""
    outputs = map(value, output_node(prologue.graph).args[0])
    return sum(output.numel() * output.itemsize for output in outputs)


def measure_timely(make: Callable[..., tuple[nn.Module, Call]], rounds: int, **how: int) -> Any:
    """Measures seconds of a step, and of its ops that depend on the timestep only."""
    torch.manual_seed(0)
    model, call = make(**how)
    made = run_to(model, call, "hoist")
    gm, facts = made.graph, made.facts
    inputs = [call.get(name) for name in facts[passes.Captured].signature.inputs]
    inputs += facts[passes.PrologueGraph].graph(*inputs)
    timely = build_timely(gm, facts[passes.Denoised].streams)
    seconds = time_in_turn({"timely": lambda: timely(*inputs), "step": lambda: gm(*inputs)}, rounds)
    return {name: report.summarize(found, 5) for name, found in seconds.items()}


def build_timely(gm: GraphModule, denoised: Collection[str]) -> GraphModule:
    """Returns the part of a hoisted graph that no denoised input reaches."""
    given = user_inputs(gm.graph)
    free = [n for n in given if is_tensor(n) and n.name not in denoised]
    found = find_invariants(gm.graph, free)
    graph, mapping = Graph(), {}
    copy_into(graph, (*given, *found.nodes), mapping)
    graph.output(tuple(mapping[n] for n in found.frontier))
    return GraphModule(gm, graph)


def time_in_turn(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns seconds of each, after a warm-up; the order is reversed from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(-1, rounds):
        for name, run in list(runs.items())[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            run()
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compare_batched(width: int, dtype: torch.dtype, B: int) -> dict[str, Any]:
    """Compares a projection of B equal rows per step, step by step and all steps at once."""
    torch.manual_seed(0)
    linear = nn.Linear(width, 6 * width, dtype=dtype)
    x_ND = torch.randn(NUM_STEPS, width, dtype=dtype).repeat_interleave(B, 0)
    alone = torch.cat([linear(x_BD) for x_BD in x_ND.split(B)])
    differing = (linear(x_ND) != alone).float().mean()
    return {
        "width": width,
        "dtype": str(dtype).removeprefix("torch."),
        "batch": B,
        "differing_share": round(float(differing), 5),
    }


TIMELY = (
    (make_dit, {"size": 32}, 1, 4),
    (make_dit, {"size": 64}, 1, 2),
    (make_sd3, {"size": 32}, 1, 3),
    (make_sd3, {"size": 64}, 1, 2),
    (make_flux, {"size": 16}, 1, 3),
    (make_flux, {"size": 32}, 1, 2),
    (make_cogvideox, {"size": 16}, 1, 2),
    (make_latte, {"size": 16, "heads": 16, "head_dim": 72, "frames": 4}, 1, 2),
)
"""A function that makes a model, its sizes, and two numbers of layers."""


def describe_timely(rounds: int) -> list[dict[str, Any]]:
    """Returns a row per model of :data:`TIMELY`."""
    rows = []
    for make, how, few, more in TIMELY:
        first, second = (measure_timely(make, rounds, layers=n, **how) for n in (few, more))
        added = {name: second[name]["median"] - first[name]["median"] for name in first}
        share = second["timely"]["median"] / second["step"]["median"]
        row = {"model": make.__name__.removeprefix("make_"), **how, "layers": more, **second}
        row |= {"share": round(share, 4)}
        row |= {"share_of_a_layer": round(added["timely"] / added["step"], 4)}
        print(row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Measures all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=report.ROOT / "bench/results/hoisting.json")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with torch.no_grad():
        content = {
            "run": report.describe_run(),
            "kept": {
                "demo": measure_kept(make_demo, 6 * options.rounds),
                "latte 12+12": measure_kept(make_latte, options.rounds),
                "latte 28+28, full size, bfloat16": measure_full_size(),
            },
            "batched": [
                compare_batched(width, dtype, B)
                for width in (512, 1152)
                for dtype in (torch.float32, torch.bfloat16)
                for B in (1, 2)
            ],
        }
        print(content["kept"], content["batched"], sep="\n", flush=True)
        content["timely"] = describe_timely(options.rounds)
    report.write_json(options.out, content)


if __name__ == "__main__":
    main()
