"""What users call: :func:`compile` and :func:`explain`."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.fx import GraphModule

from pabc import passes
from pabc.autocast import without_autocast
from pabc.explanation import Explanation, describe
from pabc.passes.capture import bind_arguments
from pabc.passes.tracing.structure import Structure, check_constants, flatten
from pabc.pipeline import Config, analyze
from pabc.plan import Plan
from pabc.program import Backend, Program
from pabc.promotion import Promotions, call_key, changed_numbers, superseded, without_sizes
from pabc.schedule import Schedule
from pabc.trajectory import Trajectory


def compile(
    model: nn.Module,
    schedule: Schedule,
    *,
    backend: Backend = "inductor",
    cut: passes.Cut = "attention",
    kinds: Mapping[str, str] | None = None,
    latents: str | None = None,
    dynamic: bool = False,
    example_inputs: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
) -> CompiledModel:
    """Makes a diffusion transformer reuse attention (and MLP) branches across diffusion steps.

    Args:
        model: the transformer, in eval mode; left as it is, its parameters shared.
        schedule: which kinds of region are reused at which steps.
        backend: `"inductor"`; `"eager"`: the specialized graphs, not compiled further, the model's
            own bits where nothing is reused; `"oracle"`: the guarded graph, unspecialized.
        cut: what is kept of a region. `"attention"`: the last value before the timestep's gate;
            `"branch"`: the value added to the residual stream.
        kinds: patterns of qualified module names (fnmatch) -> kind, where you know better.
        latents: the name of the denoised input, where it is not the first that comes out again.
        dynamic: one capture serves all sizes of the tensors for which the model does the same; the
            plan's bytes are those of the first call. `backend="inductor"` still compiles per size.
        example_inputs: `(args, kwargs)` of a call: captures and compiles now, not when called.

    Returns:
        A module with the model's own call signature and output type. The calls of one generation
        are its steps, in order.

    Raises:
        TypeError: `model` is no module, or `schedule` no :class:`pabc.Schedule`.
        ValueError: an option is not among those allowed, or the model cannot be compiled; the
            message names the node and the reason.

    Source: Pyramid Attention Broadcast, arXiv 2408.12588.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if not isinstance(schedule, Schedule):
        raise TypeError(
            f"schedule: expected a pabc.Schedule, found {type(schedule).__name__}; "
            "see pabc.Schedule.pyramid and pabc.presets"
        )
    _check_choice("backend", backend, get_args(Backend))
    _check_choice("cut", cut, get_args(passes.Cut))
    config = Config(cut=cut, kinds=dict(kinds or {}), latents=latents, dynamic=dynamic)
    compiled = CompiledModel(model, schedule, backend, config)
    if example_inputs is not None:
        args, kwargs = example_inputs
        compiled.prepare(*args, **kwargs)
    return compiled


def explain(
    model: nn.Module,
    *args: Any,
    kinds: Mapping[str, str] | None = None,
    latents: str | None = None,
    cut: passes.Cut = "attention",
    **kwargs: Any,
) -> Explanation:
    """What :func:`compile` would find in `model` when called with these arguments; no schedule.

    Raises: ValueError as :func:`compile` does.
    """
    config = Config(cut=cut, kinds=dict(kinds or {}), latents=latents)
    bound = bind_arguments(inspect.signature(model.forward), args, kwargs)
    guarded, _ = analyze(model, *bound, config)
    return describe(guarded)


class CompiledModel(nn.Module):
    """A model that follows a schedule. Made by :func:`compile`; called like the model itself.

    Attributes of the model (`config`, `dtype`, ...) and its state dict are passed through.
    """

    def __init__(
        self, model: nn.Module, schedule: Schedule, backend: Backend, config: Config
    ) -> None:
        super().__init__()
        self._orig_mod = model
        self.training = model.training
        self.schedule = schedule
        self._backend = backend
        self._config = config
        self._call_signature = inspect.signature(model.forward)
        self._programs: dict[Any, list[Program]] = {}
        self._of_any_size: dict[Any, list[Program]] = {}
        self._promotions = Promotions()
        self._program: Program | None = None
        self._trajectory: Trajectory | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One diffusion step, with the model's own arguments and result."""
        program, inputs = self._select(args, kwargs)
        trajectory = self._trajectory
        layout = program.layout(inputs)
        fits = trajectory is not None and trajectory.plan is program.plan
        if trajectory is None or not fits or trajectory.layout != layout:
            step = trajectory.step if trajectory is not None else 0
            trajectory = self._trajectory = Trajectory(program.plan, layout)
            trajectory.step = step  # a call of another shape: same step, nothing stored
        with torch.no_grad(), without_autocast(inputs):
            outputs = program.run(trajectory, inputs)
        return program.signature.out_spec.unflatten(outputs)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Captures this call's signature and compiles all of its phases, without running a step."""
        program, inputs = self._select(args, kwargs)
        with without_autocast(inputs):
            program.prepare(inputs)

    def reset(self) -> None:
        """Starts a new generation: the next call is step 0 and finds nothing stored."""
        if self._trajectory is not None:
            self._trajectory.reset()

    @property
    def plan(self) -> Plan:
        """The schedule bound to this model's slots."""
        return self._captured("plan").plan

    @property
    def phases(self) -> tuple[GraphModule, ...]:
        """The specialized modules, one per phase of the plan, in the plan's order.

        Inputs: the model's flattened arguments, then the reused cuts; output: (the model's
        flattened outputs, the stored cuts). Regions that are computed are called submodules.
        """
        return self._captured("phases").phases

    def explain(self) -> Explanation:
        """What was found in the model, and the plan."""
        program = self._captured("explain()")
        return describe(
            program.guarded,
            plan=program.plan,
            unmatched=self.schedule.unmatched(program.plan.slots),
            compile_seconds=program.compile_seconds,
        )

    def dump(self, folder: str | Path) -> Path:
        """Writes what the compiler did: each stage's graph, the phases, the plan, the findings."""
        program = self._captured("dump()")
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for i, record in enumerate(program.records):
            (target / f"{i}_{record.name}.py").write_text(record.code)
        for region in program.regions:
            code = program.guarded.get_submodule(region.name).code
            (target / f"region_{region.name}.py").write_text(str(code))
        for i, phase in enumerate(program.phases):
            (target / f"phase_{i}.py").write_text(phase.code)
        (target / "plan.json").write_text(program.plan.to_json())
        (target / "explain.txt").write_text(f"{self.explain()}\n")
        seconds = {record.name: record.seconds for record in program.records}
        (target / "seconds.json").write_text(json.dumps(seconds, indent=1))
        return target

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own state dict, keys unchanged."""
        return self._orig_mod.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads into the model: values copied in take effect at the next call, tensors that are
        replaced (`assign=True`) at the next generation; neither recompiles."""
        return self._orig_mod.load_state_dict(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)

    def _captured(self, what: str) -> Program:
        if self._program is None:
            raise RuntimeError(
                f"{what}: nothing is captured yet; call the model once, or give example_inputs"
            )
        return self._program

    def _select(self, args: Any, kwargs: Any) -> tuple[Program, list[Any]]:
        """The program for these arguments, captured if need be, and its flat inputs."""
        model = self._orig_mod
        if model.training:
            raise RuntimeError(
                "pabc runs inference: expected a model in eval mode, found training mode; "
                "call .eval() on it first"
            )
        args, kwargs = bind_arguments(self._call_signature, args, kwargs)
        leaves, structure = flatten((args, kwargs))
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                raise RuntimeError(
                    "pabc runs inference: expected inputs without gradients, found one of shape "
                    f"{tuple(leaf.shape)} that requires grad; detach it"
                )
        check_constants((args, kwargs), leaves, tuple(self._call_signature.parameters))
        program, differences = self._find(structure, leaves)
        if program is None:
            program = self._capture(args, kwargs, structure, leaves)
            _warn_of_reads(differences)
        self._program = program
        return program, program.pack(leaves)

    def _find(
        self, structure: Structure, leaves: list[Any]
    ) -> tuple[Program | None, list[tuple[passes.Read, Any]]]:
        """The program captured for calls like this one, with numbers as inputs or as constants.

        Where there is none: the values read from data in which it differs from those there are.
        """
        at_start = self._trajectory is None or self._trajectory.step == 0
        differences = []
        for promoted in dict.fromkeys((self._promotions.of(structure), frozenset[int]())):
            key = call_key(structure, leaves, promoted)
            known = self._programs.get(key, [])
            others = self._of_any_size.get(without_sizes(key), [])
            for programs in (known, others) if at_start else ():
                programs[:] = [p for p in programs if p.follow_weights(self._orig_mod)]
            for program in (*known, *(p for p in others if p.serves(leaves))):
                difference = program.difference(program.pack(leaves))
                if difference is None:
                    return program, []
                differences.append(difference)
        return None, differences

    def _build(self, args: Any, kwargs: Any, promoted: Collection[int]) -> Program:
        """A program for any sizes where so configured, and the model allows."""

        def build(config: Config) -> Program:
            return Program(
                self._orig_mod,
                args,
                kwargs,
                schedule=self.schedule,
                backend=self._backend,
                config=config,
                promoted=promoted,
            )

        try:
            return build(self._config)
        except ValueError as error:
            if not self._config.dynamic:
                raise
            program = build(replace(self._config, dynamic=False))
            warnings.warn(
                f"pabc: dynamic=True: captured for the sizes of this call alone, since {error}",
                stacklevel=2,
            )
            return program

    def _capture(self, args: Any, kwargs: Any, structure: Structure, leaves: list[Any]) -> Program:
        def build(promoted: Collection[int]) -> Program:
            return self._build(args, kwargs, promoted)

        key = call_key(structure, leaves, ())
        changed = changed_numbers(self._programs, key, leaves)
        found = self._promotions.capture(build, self._orig_mod, structure, leaves, changed)
        program, promoted = found or (build(()), frozenset())
        key = call_key(structure, leaves, promoted)
        for old in superseded(self._programs, key, promoted):
            del self._programs[old]
        self._programs.setdefault(key, []).append(program)
        if program.serves(leaves):
            self._of_any_size.setdefault(without_sizes(key), []).append(program)
        if names := [program.signature.inputs[i] for i in changed if i not in promoted]:
            warnings.warn(
                f"pabc captured the model anew because the number passed as {names} changed; "
                "pass a tensor where a value changes from call to call",
                stacklevel=5,
            )
        if missing := self.schedule.unmatched(program.plan.slots):
            kinds = sorted({slot.kind for slot in program.plan.slots})
            warnings.warn(
                f"pabc: the schedule asks for {', '.join(missing)}, which this model does not "
                f"have; it has {kinds}",
                stacklevel=5,
            )
        return program


def _warn_of_reads(differences: Sequence[tuple[passes.Read, Any]]) -> None:
    """Says from the third capture of one signature on what keeps changing."""
    if len(differences) > 1:
        read, value = differences[-1]
        warnings.warn(
            f"pabc captured the model anew because it reads a value from data that changed: {read} "
            f"when captured, {value} now; capture number {len(differences) + 1} of this signature",
            stacklevel=5,
        )


def _check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {tuple(allowed)}, found {value!r}")
