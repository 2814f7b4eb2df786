"""Runs the demo: one trained model in full, with torch.compile, and with pabc.

:func:`run` calibrates the model, generates the same samples with each variant, times the variants
in turn, compares what they generate, and writes figures, pictures and a report.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from pabc.api import CompiledModel
from pabc.demo import calibrated, digits, files, latte, machine, metrics, models
from pabc.demo.calibrated import HEADLINE, Calibrated
from pabc.demo.launch import Launch, launch
from pabc.demo.model import Model
from pabc.demo.timing import Round, Variant, race
from pabc.demo.variants import make_variants, name_skip
from pabc.differences import Differences


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of `pabc demo`.

    Attributes:
        model: the name of the trained model, one of `pabc.demo.models.MODELS`.
        steps: the diffusion steps; None: the model's usual number.
        prompts: captions, or the number of built-in ones; they are one batch.
        repeats: the number of timed generations of each variant, at least.
        clips: the number of clips of each variant that are judged and compared, at least.
        weights: the folder of the trained model; None: the one in the package.
        mlp: True to add the Latte preset with its MLP broadcast.
        mesh: the mesh of the processes that torchrun started, by size: (tokens,), or
            (samples, tokens); adds variants that run on all of them. None: one process.
    """

    model: str = latte.Digits.name
    device: str = "cpu"
    steps: int | None = None
    prompts: int | tuple[str, ...] = 4
    repeats: int = 5
    clips: int = 40
    out: Path = Path("pabc-demo")
    seed: int = 0
    backend: Literal["inductor", "eager"] = "inductor"
    weights: Path | None = None
    mlp: bool = False
    mesh: tuple[int, ...] | None = None


def example() -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Returns the trained transformer and the arguments of one call, for `pabc explain`."""
    model = latte.load()
    latents, text = model.noise(0, 2), model.text.encode([digits.PROMPTS[0], ""])
    return model.transformer, (latents, torch.full((2,), 999), text), {"return_dict": False}


def run(options: DemoOptions) -> dict[str, Any]:
    """Runs the demo, prints its table, writes its files; returns the content of `metrics.json`.

    With a mesh, the other processes take part in the variants of several, and return {}.

    Raises:
        FileNotFoundError: the model's weights are missing.
        CaptionError: the model cannot draw a caption.
        ValueError: there is no such model, or the mesh has more or fewer processes than were
            started.
    """
    with launch(options.mesh, options.device) as processes:
        model = models.load(options.model, options.weights, processes.device)
        rounds = plan_rounds(model, options)
        steps = options.steps or model.num_steps
        judged = {caption for batch in rounds for caption in batch.captions}
        found = (
            calibrated.calibrate(model, steps=steps, judged=judged, seed=options.seed)
            if processes.is_first
            else None
        )
        variants = make_variants(
            model,
            steps=steps,
            backend=options.backend,
            mlp=options.mlp,
            mesh=processes.mesh,
            calibrated=found,
        )
        if processes.is_first:
            return _run_first(options, processes, model, variants, rounds, found)
        race(model, variants, rounds, processes=processes)
        processes.wait()
        return {}


def _run_first(
    options: DemoOptions,
    processes: Launch,
    model: Model,
    variants: Sequence[Variant],
    rounds: list[Round],
    found: Calibrated | None,
) -> dict[str, Any]:
    options.out.mkdir(parents=True, exist_ok=True)
    warnings = machine.find_busy_machine()
    warnings += found.warnings if found else ()
    if options.backend == "eager":
        warnings.append("backend eager: nothing is compiled to kernels, so speeds are only a hint")
    _warn(warnings)
    runs = race(model, variants, rounds, progress=make_bar, processes=processes)
    processes.wait()
    steps = options.steps or model.num_steps
    differences = _measure_differences(model, rounds[0], steps)
    table = metrics.measure(model, variants, runs, rounds)
    concerns = metrics.find_concerns(table)
    _warn(concerns)
    content = {
        "model": model.name,
        "about": model.about,
        "judged": model.judged,
        "headline": HEADLINE if HEADLINE in table else name_skip(steps),
        "variants": table,
        "calibration": calibrated.describe(found, table) if found else None,
        "steps": steps,
        "batch": len(rounds[0].captions),
        "clips": len(rounds) * len(rounds[0].captions),
        "rounds": len(rounds),
        "backend": options.backend,
        "seed": options.seed,
        "guidance": model.guidance,
        "prompts": list(rounds[0].captions),
        "mesh": options.mesh,
        "matmul": machine.find_libraries(torch.device(processes.device), options.backend),
        **machine.describe_machine(torch.device(processes.device)),
        "warnings": [*warnings, *concerns],
    }
    written = files.write(
        options.out,
        model,
        content,
        method=describe_method(content),
        variants=variants,
        runs=runs,
        rounds=rounds,
        curves=differences.curves(),
        calibration=found.calibration if found else None,
    )
    print(format_text(content))
    for variant in variants:
        if variant.ranks > 1:
            print("\n".join(["", f"{variant.name}:", *_describe_ranks(variant.transformer)]))
    print("\nwrote " + ", ".join(str(options.out / name) for name in written))
    return content


def _measure_differences(model: Model, batch: Round, steps: int) -> Differences:
    differences = Differences(model.transformer)
    captions = list(batch.captions)
    with make_bar(steps, "measure differences") as done:
        model.generate(
            differences,
            captions,
            model.noise(batch.seed, len(captions)),
            num_steps=steps,
            progress=lambda *_: done.update(1),
        )
    return differences


def _describe_ranks(transformer: CompiledModel) -> list[str]:
    found = transformer.explain()
    assert found.communication is not None
    return found.communication.lines(found.plan)


def plan_rounds(model: Model, options: DemoOptions) -> list[Round]:
    """Returns the batches to generate: the prompts, then others, or the prompts again if given.

    There are enough rounds for both `repeats` and `clips`: each generation is timed and judged.

    Raises CaptionError if the model cannot draw a caption.
    """
    given = options.prompts if isinstance(options.prompts, tuple) else None
    for prompt in given or ():
        model.check_prompt(prompt)
    first = given or _pick_prompts(model, int(options.prompts))  # type: ignore[arg-type]
    size = len(first)
    num_rounds = max(options.repeats, ceil(options.clips / size))
    others = model.prompts(options.seed, num_rounds * size)
    batches = [first]
    for index in range(num_rounds - 1):
        batches.append(given or tuple(others[index * size : (index + 1) * size]))
    return [Round(batch, options.seed + index) for index, batch in enumerate(batches)]


def _pick_prompts(model: Model, count: int) -> tuple[str, ...]:
    return tuple([*model.examples, *model.prompts(0, count)][:count])


def format_text(content: dict[str, Any]) -> str:
    """Returns the tables as they are printed, with explanations."""
    variants = content["variants"]
    about = [f"{name}: {row['about']}" for name, row in variants.items()]
    return "\n".join(
        [
            "",
            "Work and quality, much the same on all machines:",
            *_format_table(*metrics.format_work(variants)),
            "",
            "Time on this machine:",
            *_format_table(*metrics.format_time(variants)),
            "",
            *about,
            "",
            *_format_calibration(content["calibration"]),
            *textwrap.wrap(describe_method(content), 100),
        ]
    )


def _format_calibration(content: dict[str, Any] | None) -> list[str]:
    """Returns the lines on what was predicted, with an empty one behind; none without any."""
    if content is None:
        return []
    plans = [f"{name}: {plan['plan']}" for name, plan in content["plans"].items()]
    text = (
        f"Calibration: {content['seconds']:.0f} s, on {len(content['captions'])} captions and noise"
        f" that are not judged. Plans taken: {'; '.join(plans)}. {calibrated.say_misses(content)}"
    )
    return [*textwrap.wrap(text, 100), ""]


def _format_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Returns a table as aligned lines, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in (header, *rows)
    ]


def describe_method(content: dict[str, Any]) -> str:
    """Returns a description, in a few sentences, of how the figures were measured."""
    matmul = content["matmul"]
    return (
        f"{content['steps']} steps, batches of {content['batch']} with guidance, on"
        f" {content['device']}, threads: {content['threads']}. Medians over {content['rounds']}"
        " interleaved rounds; every variant starts from the same noise. Calls, FLOPs: calls of the"
        " model that run, and the share of the full model's operations. By less work: seconds of"
        " the same code with nothing left out (pabc without reuse, or torch.compile with all"
        " steps) over the variant's. By other code: torch.compile's seconds over those of that"
        " code, which comes from cheaper formulas and the library of matrix products (here"
        f" {matmul['pabc']} in pabc, {matmul['torch']} in PyTorch) and differs from machine to"
        " machine. PSNR and SSIM: against the full model's samples, means over"
        f" {content['clips']} samples; {content['judged']}. Compile seconds: wall time of the first"
        " generation, capture included, less that of a steady one, from an empty cache."
    )


def make_bar(length: int, label: str) -> Any:
    """Returns a progress bar; it is redrawn rarely if stderr is not a terminal."""
    return tqdm(
        total=length,
        desc=label,
        leave=False,
        mininterval=0.1 if sys.stderr.isatty() else 10,
        # No estimate of the time left: the first steps compile, and would distort it.
        bar_format="{desc}: {bar:30} {n_fmt}/{total_fmt} [{elapsed}]",
    )


def _warn(messages: Sequence[str]) -> None:
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
