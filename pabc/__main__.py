"""The command line: `pabc demo`, `explain`, `calibrate` and `comfyui`, also as `python -m pabc`."""

from __future__ import annotations

import argparse
import ast
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch
from torch import nn

import pabc
from pabc.api import explain_call
from pabc.base.kinds import FINE
from pabc.commands.calibrate import add_calibrate
from pabc.commands.comfyui import add_comfyui
from pabc.commands.usage import UsageError, at_least, check_extra, find_callable, parse_device
from pabc.options import Options
from pabc.passes import Cut
from pabc.stages import format_records

EXAMPLE = "pabc.demo.run:example"

_TARGET_HELP = f"""\
module:callable, called without arguments. It returns (model, args, kwargs): the model and the
arguments of one call; or the model alone, with --input for the arguments. Default: {EXAMPLE},
the demo's model."""

_EXPLAIN_EPILOG = """\
examples:
  pabc explain
  pabc explain my_models:video_model
  pabc explain my_models:Transformer --input 'x=[2,4,8,16,16]' --input 'timestep=[2]:int64'
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status. A usage error exits with status 2."""
    parser = _make_parser()
    options = parser.parse_args(argv)
    if "run" not in options:
        parser.print_help()
        return 0
    # PyTorch's own, raised inside torch.export; nothing to be done about it here.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    try:
        options.run(options)
    except (UsageError, FileNotFoundError) as error:
        fail(f"pabc {options.command}: error: {error}")
    return 0


def fail(message: str) -> NoReturn:
    """Prints to stderr and exits with status 2, as argparse does."""
    print(message, file=sys.stderr)
    raise SystemExit(2)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("pabc", description=pabc.__doc__)
    parser.add_argument("--version", action="version", version=f"pabc {pabc.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    _add_demo(commands.add_parser("demo", help="generate, time and compare clips; write a report"))
    add_calibrate(commands)
    add_comfyui(commands)
    explain = commands.add_parser(
        "explain",
        help="print what is found in a model",
        epilog=_EXPLAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_explain(explain)
    return parser


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Generates clips or pictures with a small trained model: in full, with torch.compile, and"
        " with pabc. Prints a table and writes metrics.json, clips.gif, clips.png and report.html."
    )
    add = parser.add_argument
    add("--device", type=parse_device, default="cpu", help="cpu, cuda, cuda:1, ... (cpu)")
    add("--model", choices=("digits", "emoji"), default="digits", help="the model (digits)")
    add("--steps", type=at_least(2), help="diffusion steps (50; emoji: 28)")
    add(
        "--prompts",
        nargs="+",
        default=["4"],
        metavar="CAPTION",
        help="captions, or how many of the built-in ones (4); they are one batch",
    )
    add("--repeats", type=at_least(1), default=5, help="times each variant, at least (5)")
    add("--clips", type=at_least(1), default=40, help="samples to judge per variant (40)")
    add("--out", type=Path, default=Path("pabc-demo"), help="folder to write (pabc-demo)")
    add("--seed", type=at_least(0), default=0, help="of the initial noise (0)")
    add("--backend", choices=("inductor", "eager"), default="inductor", help="eager: a quick look")
    add("--mlp", action="store_true", help="also the Latte preset with its MLP broadcast")
    add(
        "--mesh",
        type=_parse_mesh,
        metavar="N",
        help="also on N processes, started by torchrun; BxN: B groups of samples, N of tokens each",
    )
    add(
        "--weights",
        type=Path,
        help="folder of a model trained with bench/train_demo.py or bench/train_emoji.py",
    )
    parser.set_defaults(run=run_demo)


def _add_explain(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", nargs="?", default=EXAMPLE, metavar="module:callable", help=_TARGET_HELP)
    add(
        "--input",
        action="append",
        type=_parse_pair,
        default=[],
        metavar="NAME=VALUE",
        help="an argument: [2,4,16,16] or [2]:int64 is a tensor of zeros, else a Python literal",
    )
    add(
        "--kinds",
        action="append",
        type=_parse_kind,
        default=[],
        metavar="PATTERN=KIND",
        help=f"modules whose kind you know better; KIND is one of {', '.join(FINE)}",
    )
    add("--latents", metavar="NAME", help="the denoised input, if not found by itself")
    add("--cut", choices=get_args(Cut), default="attention", help="what is kept (attention)")
    add(
        "--ranks",
        type=_parse_mesh,
        metavar="N",
        help="sharded over N processes, or BxN, none of which need exist: what each sends",
    )
    add("--stages", action="store_true", help="list the compiler's stages: nodes, seconds, bits")
    parser.set_defaults(run=run_explain)


def run_demo(options: argparse.Namespace) -> None:
    """Runs `pabc demo`."""
    check_extra()
    from pabc.demo.launch import check_mesh
    from pabc.demo.run import DemoOptions, run
    from pabc.demo.text import CaptionError

    prompts = options.prompts
    if len(prompts) == 1 and re.fullmatch(r"[+-]?\d+", prompts[0]):
        if int(prompts[0]) < 1:
            raise UsageError(f"--prompts: expected 1 or more, or captions, found {prompts[0]}")
        chosen: int | tuple[str, ...] = int(prompts[0])
    else:
        chosen = tuple(prompts)
    if options.mesh is not None:
        try:
            check_mesh(options.mesh)
        except ValueError as error:
            raise UsageError(f"--mesh: {error}") from error
    given = {field.name: getattr(options, field.name) for field in fields(DemoOptions)}
    try:
        run(DemoOptions(**{**given, "prompts": chosen}))
    except CaptionError as error:
        raise UsageError(f"--prompts: {error}") from error


def run_explain(options: argparse.Namespace) -> None:
    """Runs `pabc explain`."""
    if options.target == EXAMPLE:
        check_extra()
    model, args, kwargs = load_target(options.target, dict(options.input))
    if model.training:
        print("note: the model was in training mode; explained in eval mode", file=sys.stderr)
        model.eval()
    try:
        found = explain_call(
            model,
            args,
            kwargs,
            Options.of(
                kinds=dict(options.kinds),
                latents=options.latents,
                cut=options.cut,
                ranks=options.ranks,
            ),
            traces_phase=options.stages,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    except TypeError as error:
        raise UsageError(
            f"{options.target}: the model does not take these inputs: {error}"
        ) from error
    print(found)
    if options.stages:
        print("\n".join(format_records(found.stages)))


def load_target(
    target: str, inputs: Mapping[str, str]
) -> tuple[nn.Module, Sequence[Any], Mapping[str, Any]]:
    """Returns model, args and kwargs of `module:callable`; parses `inputs` and adds them to kwargs.

    Raises UsageError where the target is not there, or returns something else.
    """
    result = find_callable(target)()
    if isinstance(result, nn.Module):
        if not inputs:
            raise UsageError(
                f"{target} returned a model without inputs: return (model, args, kwargs), or give"
                " each input with --input NAME=VALUE"
            )
        result = (result, (), {})
    match result:
        case (nn.Module() as model, (tuple() | list()) as args, Mapping() as kwargs):
            dtype = next((p.dtype for p in model.parameters()), torch.float32)
            given = {name: _parse_input(name, text, dtype) for name, text in inputs.items()}
            return model, args, {**kwargs, **given}
    raise UsageError(
        f"{target}: expected a torch.nn.Module, or a tuple (model, args, kwargs), found"
        f" {type(result).__name__}"
    )


def _parse_input(name: str, text: str, dtype: torch.dtype) -> Any:
    """Returns a tensor of zeros for `[2,4]` or `[2]:int64`, else a Python literal."""
    shape, _, suffix = text.partition("]:") if text.startswith("[") else (text, "", "")
    try:
        value = ast.literal_eval(f"{shape}]" if suffix else shape)
    except (ValueError, SyntaxError) as error:
        raise UsageError(
            f"--input {name}: expected a shape such as [2,4,16,16], with a dtype as in [2]:int64,"
            f" or a Python literal, found {text!r}"
        ) from error
    if not isinstance(value, list):
        return value
    wanted = getattr(torch, suffix, None) if suffix else dtype
    if not isinstance(wanted, torch.dtype) or not all(isinstance(n, int) for n in value):
        raise UsageError(f"--input {name}: expected integers, and a torch dtype, found {text!r}")
    return torch.zeros(value, dtype=wanted)


def _parse_pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    return name, value


def _parse_kind(text: str) -> tuple[str, str]:
    pattern, _, kind = text.rpartition("=")
    if not pattern or kind not in FINE:
        allowed = f"PATTERN=KIND with KIND one of {', '.join(FINE)}"
        raise argparse.ArgumentTypeError(f"expected {allowed}, found {text!r}")
    return pattern, kind


def _parse_mesh(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", text):
        raise argparse.ArgumentTypeError(f"expected N or BxN, such as 4 or 2x4, found {text!r}")
    return tuple(map(int, text.split("x")))


if __name__ == "__main__":
    sys.exit(main())
