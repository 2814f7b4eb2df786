"""`pabc calibrate`: calibrates the demo's models, a folder of a pipeline, or what a user names."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pabc
from pabc.commands.usage import UsageError, at_least, check_extra, find_callable, parse_device

_TARGET_HELP = """\
module:callable, called without arguments. It returns (sample, model): sample(model, seed) runs one
full generation with the model, or pipeline, and returns the result."""

_EPILOG = """\
examples:
  pabc calibrate --demo digits --speedup 1.5 2 3 --plot frontier.svg
  pabc calibrate --pipeline ./my-model --prompt "a red car" --steps 28 --speedup 2 --verify 100 101
  pabc calibrate my_models:make --psnr 45 --seeds 0 1 --resume notes.npz
"""
DTYPES = ("float32", "bfloat16", "float16")


def add_calibrate(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    parser = commands.add_parser(
        "calibrate",
        help="find which calls of a model to run, and how to forecast the others",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Records a full generation, searches for plans that skip calls of the model, runs some"
            " of them, prints a table, and writes the calibration to a file for"
            " pabc.Calibration.load."
        ),
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("target", nargs="?", metavar="module:callable", help=_TARGET_HELP)
    what.add_argument("--demo", choices=("digits", "emoji"), help="one of the demo's models")
    what.add_argument("--pipeline", metavar="FOLDER", help="a folder of a diffusers pipeline")
    add("--prompt", action="append", help="for --pipeline; several are used in turn, by seed")
    add("--steps", type=at_least(2), help="steps of a generation (the model's usual number)")
    add("--guidance", type=float, help="scale of guidance (the model's usual one)")
    add("--device", type=parse_device, default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    add("--dtype", choices=DTYPES, help="of a pipeline's weights (as they are stored)")
    add("--speedup", type=float, nargs="+", help="of a generation's calls; 2, without another goal")
    add("--psnr", type=float, nargs="+", help="the least PSNR to the full result, in dB")
    add("--calls", type=at_least(1), nargs="+", help="how many steps call the model")
    add("--seeds", type=at_least(0), nargs="+", default=[0], help="those that are recorded (0)")
    add("--candidates", type=at_least(1), default=6, help="plans that are run for a goal (6)")
    add("--floor", type=float, default=40.0, help="no plan below this PSNR is taken (40)")
    add(
        "--verify",
        type=at_least(0),
        nargs="+",
        metavar="SEED",
        help="other seeds to judge plans by",
    )
    add("--out", type=Path, default=Path("calibration.npz"), help="the file (calibration.npz)")
    add("--plot", type=Path, metavar="FILE", help="an SVG file for the frontier")
    add("--resume", type=Path, metavar="FILE", help="what was run so far, and is not run again")
    add("--quiet", action="store_true", help="show no progress")
    parser.set_defaults(run=run_calibrate)


def run_calibrate(options: argparse.Namespace) -> None:
    """Runs `pabc calibrate`."""
    goals = {name: getattr(options, name) for name in ("speedup", "psnr", "calls")}
    if not any(goals.values()):
        goals["speedup"] = [2.0]
    for name in ("out", "plot"):
        path: Path | None = getattr(options, name)
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"--{name}: expected a file in a folder, found no {path.parent}")
    sample, model = _find_subject(options)
    shows = not options.quiet
    try:
        calibration = pabc.calibrate(
            sample,
            model,
            **goals,
            seeds=options.seeds,
            candidates=options.candidates,
            floor=options.floor,
            progress=shows,
            resume=options.resume,
        )
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error
    print(calibration)
    print(f"written: {calibration.save(options.out)}")
    if options.plot is not None:
        print(f"written: {calibration.plot(options.plot)}")
    for target, _ in calibration.plans if options.verify else ():
        given: dict[str, Any] = {target.measure: target.value}
        print(calibration.verify(sample, model, options.verify, progress=shows, **given))


Subject = tuple[Callable[[Any, int], Any], Any]


def _find_subject(options: argparse.Namespace) -> Subject:
    if options.demo is not None:
        return _make_demo(options)
    if options.pipeline is not None:
        return _make_pipeline(options)
    result = find_callable(options.target)()
    if isinstance(result, tuple) and len(result) == 2 and callable(result[0]):
        return result
    raise UsageError(
        f"{options.target}: expected a tuple (sample, model), found {type(result).__name__}"
    )


def _make_demo(options: argparse.Namespace) -> Subject:
    check_extra()
    from pabc.demo import models

    demo = models.load(options.demo, device=options.device)

    def sample(transformer: Any, seed: int) -> torch.Tensor:
        return demo.generate(
            transformer,
            demo.prompts(seed, 1),
            demo.noise(seed, 1),
            num_steps=options.steps,
            guidance=options.guidance,
        )

    return sample, demo.transformer


def _make_pipeline(options: argparse.Namespace) -> Subject:
    if not options.prompt:
        raise UsageError("--prompt: expected one or more with --pipeline, found none")
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise UsageError("--pipeline needs diffusers: pip install 'pabc[demo]'") from error
    dtype = {} if options.dtype is None else {"torch_dtype": getattr(torch, options.dtype)}
    try:
        pipe = DiffusionPipeline.from_pretrained(options.pipeline, **dtype).to(options.device)
    except (OSError, ValueError) as error:
        raise UsageError(f"--pipeline {options.pipeline}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    named = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    given = {name: value for name, value in named.items() if value is not None}

    def sample(pipe: Any, seed: int) -> Any:
        prompt = options.prompt[seed % len(options.prompt)]
        generator = torch.Generator().manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            return pipe(prompt, generator=generator, output_type="latent", **given)

    return sample, pipe
