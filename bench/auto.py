"""Measures pabc.auto: two processes one after the other, and what a recording costs.

    python bench/auto.py --out bench/results/auto.json

Part `processes`: a Wan pipeline of diffusers with random weights runs generations with
`pabc.auto(speedup=2)` in a process of its own, and then in another one with the same folder of
recordings, which starts with the plan. A row is a generation: seconds, calls of the model, and the
PSNR of its latents to those of the pipeline alone, with the same noise.

Part `recording`: what one recording keeps and computes at published sizes, on random tensors of
these shapes: bytes of copies, seconds of copying and of the inner products, and the operations of
these as a share of those of the calls that are recorded, where these are known.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import torch

import pabc
from pabc.base.format import format_bytes, format_table
from pabc.base.structure import flatten
from pabc.calibration.hearing import Hearing

PARTS = ("processes", "recording")
STEPS = 30
GENERATIONS = 3


@dataclass(frozen=True)
class Size:
    """The tensors of one call at a published size.

    Attributes:
        name: the model, and the size of its video.
        latents: the shape that it is given, with both branches of guidance in the batch.
        channels: those of its output.
        steps: of a generation.
        dtype: of both.
        flops: of one call; None: not counted here.
    """

    name: str
    latents: tuple[int, ...]
    channels: int
    steps: int
    dtype: torch.dtype
    flops: float | None


def find_sizes() -> tuple[Size, ...]:
    """Returns the sizes of which a recording is measured."""
    latte = (2, 4, 16, 64, 64)
    return (
        Size("Latte-1, 16 x 512 x 512", latte, 8, 50, torch.float16, count_latte()),
        Size("Wan 2.1, 81 x 480 x 832", (2, 16, 21, 60, 104), 16, 50, torch.bfloat16, None),
        Size("Wan 2.1, 81 x 720 x 1280", (2, 16, 21, 90, 160), 16, 50, torch.bfloat16, None),
    )


def count_latte() -> float:
    """Returns the operations of one call of Latte-1 (28 + 28 blocks of width 1152, 16 frames of
    32 x 32 tokens, 120 tokens of text, guidance as a doubled batch), by count of products."""
    width, frames, tokens, text, blocks = 1152, 16, 32 * 32, 120, 28
    each = 2 * frames * tokens
    linear = 2 * each * width * width * (4 + 8)
    cross = 2 * each * width * (2 * width + 2 * text) + 2 * 2 * frames * text * 2 * width * width
    spatial = linear + cross + 4 * each * tokens * width
    temporal = linear + 4 * each * frames * width
    return float(blocks * (spatial + temporal))


def measure_recording(size: Size, *, smoke: bool) -> dict[str, Any]:
    """Records calls with random tensors, and returns what that costs."""
    steps = 4 if smoke else size.steps
    shape = (*size.latents[:2], *(2 for _ in size.latents[2:])) if smoke else size.latents
    outputs = (shape[0], size.channels, *shape[2:])
    hearing, seconds = Hearing(), []
    for step in range(steps):
        half = torch.randn(1, *shape[1:])
        x = torch.cat([half, half]).to(size.dtype)
        result = torch.randn(outputs).to(size.dtype)
        leaves, structure = flatten(((x, torch.tensor([float(step)])), {}))
        start = time.perf_counter()
        hearing.hear(step, "model", leaves, structure, result)
        seconds.append(time.perf_counter() - start)
    nbytes, start = hearing.nbytes, time.perf_counter()
    recording = hearing.finish(range(steps)).recording
    products = time.perf_counter() - start
    flops = 2.0 * len(recording.gram) ** 2 * recording.elements
    return {
        "name": size.name,
        "steps": steps,
        "bytes": nbytes,
        "copy_seconds": sum(seconds),
        "product_seconds": products,
        "kept_bytes": recording.gram.nbytes,
        "flops": flops,
        "share": None if size.flops is None else flops / (steps * size.flops),
    }


def make_pipeline(*, smoke: bool) -> tuple[Any, tuple[int, ...]]:
    """Returns a Wan pipeline with random weights, and the shape of its latents."""
    import diffusers

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2 if smoke else 8,
        attention_head_dim=16 if smoke else 32,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=64 if smoke else 1024,
        num_layers=1 if smoke else 8,
        rope_max_seq_len=64,
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanPipeline(None, None, None, scheduler, model)
    pipe.set_progress_bar_config(disable=True)
    return pipe, (1, 16, 3, 4, 4) if smoke else (1, 16, 5, 16, 16)


def run_process(*, smoke: bool, backend: str) -> dict[str, Any]:
    """Runs generations with pabc.auto, and returns what was seen of each."""
    pipe, shape = make_pipeline(smoke=smoke)
    steps = 8 if smoke else STEPS

    def generate(target: Any, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        texts = torch.randn(2, 1, 16, 32, generator=generator)
        return target(
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1],
            latents=torch.randn(shape, generator=generator),
            height=8 * shape[-2],
            width=8 * shape[-1],
            num_frames=4 * shape[2] - 3,
            num_inference_steps=steps,
            guidance_scale=5.0,
            output_type="latent",
            return_dict=False,
        )[0]

    alone = [generate(pipe, seed) for seed in range(GENERATIONS)]
    request = pabc.auto(speedup=2.0, floor=1.0 if smoke else 40.0)
    rows = []
    with pabc.compile_pipeline(pipe, request, backend=backend) as fast:
        model = fast.models["transformer"]
        for seed in range(GENERATIONS):
            before, start = model.stats, time.perf_counter()
            found = generate(fast, seed)
            seconds, after = time.perf_counter() - start, model.stats
            calls = after.calls - before.calls
            rows.append(
                {
                    "seconds": seconds,
                    "calls": calls,
                    "computed": calls - (after.reused - before.reused),
                    "recorded": after.recorded - before.recorded,
                    "psnr": psnr(found, alone[seed]),
                }
            )
        return {"generations": rows, "plan_source": model.stats.plan_source}


def psnr(found: torch.Tensor, full: torch.Tensor) -> float:
    """Returns the PSNR in dB; the peak is the range of `full`."""
    error = float((found - full).square().mean().sqrt())
    return 20 * math.log10(float(full.max() - full.min()) / error) if error else math.inf


def measure_processes(*, smoke: bool, backend: str) -> list[dict[str, Any]]:
    """Runs two processes, one after the other, with one folder of recordings."""
    command = [sys.executable, __file__, "--child", "--backend", backend]
    command += ["--smoke"] if smoke else []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "PABC_CACHE": folder}
        found = []
        for _ in range(2):
            done = subprocess.run(
                command, env=environment, check=True, text=True, stdout=subprocess.PIPE
            )
            process = json.loads(done.stdout.splitlines()[-1])
            process["plan_source"] = process["plan_source"].replace(folder, "$PABC_CACHE")
            found.append(process)
    return found


def format_processes(found: list[dict[str, Any]]) -> str:
    """Returns the table of generations."""
    rows = [
        (
            f"{number + 1}, generation {k + 1}",
            f"{row['seconds']:.2f}",
            f"{row['computed']} of {row['calls']}",
            str(row["recorded"]),
            "exact" if math.isinf(row["psnr"]) else f"{row['psnr']:.1f} dB",
        )
        for number, process in enumerate(found)
        for k, row in enumerate(process["generations"])
    ]
    header = ("process", "seconds", "calls computed", "recorded", "PSNR")
    sources = [f"process {i + 1}: {each['plan_source']}" for i, each in enumerate(found)]
    return "\n".join([*format_table(header, rows), *sources])


def format_recordings(found: list[dict[str, Any]]) -> str:
    """Returns the table of what recordings cost."""
    rows = [
        (
            row["name"],
            str(row["steps"]),
            format_bytes(row["bytes"]),
            f"{1000 * row['copy_seconds'] / row['steps']:.1f} ms",
            f"{row['product_seconds']:.1f} s",
            f"{row['flops'] / 1e9:.0f} GFLOP",
            "-" if row["share"] is None else f"{row['share']:.1e}",
            format_bytes(row["kept_bytes"]),
        )
        for row in found
    ]
    header = ("size", "steps", "copies", "copying a call", "products", "of them") + (
        "of the calls' work",
        "kept in the end",
    )
    return "\n".join(format_table(header, rows))


def main() -> None:
    """Measures, prints tables and writes a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--backend", default="inductor", choices=("inductor", "eager", "original"))
    parser.add_argument("--smoke", action="store_true", help="the smallest shapes")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_process(smoke=args.smoke, backend=args.backend)))
        return
    result: dict[str, Any] = {"run": report.describe_run(), "backend": args.backend}
    if args.part in (None, "processes"):
        result["processes"] = measure_processes(smoke=args.smoke, backend=args.backend)
        print(format_processes(result["processes"]))
    if args.part in (None, "recording"):
        result["recording"] = [measure_recording(size, smoke=args.smoke) for size in find_sizes()]
        print(format_recordings(result["recording"]))
    if args.out is not None:
        report.write_json(args.out, result)


if __name__ == "__main__":
    main()
