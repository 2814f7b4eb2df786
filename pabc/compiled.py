"""The compiled model, which :func:`pabc.compile` returns: it follows a schedule."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from pabc import inplace
from pabc.artifact.errors import ArtifactError
from pabc.artifact.files import write_artifact
from pabc.base.kinds import COARSE
from pabc.base.structure import Structure
from pabc.dumps import write_dump, write_plan
from pabc.explanation import Explanation
from pabc.internals.modules import children_of
from pabc.options import Options
from pabc.plan import Plan
from pabc.runtime.around import call_around
from pabc.runtime.bindings import Binding
from pabc.runtime.listening import HeardCall, Listener, Planning
from pabc.runtime.peers import Peers, RankStep
from pabc.runtime.program import Program
from pabc.runtime.programs import Programs
from pabc.runtime.selection import Selection
from pabc.runtime.serving import ServingProgram, ServingPrograms
from pabc.runtime.stats import GIVEN, Recorder, Stats
from pabc.runtime.step import ActiveStep
from pabc.runtime.timesteps import TimestepArguments
from pabc.runtime.trajectory import (
    Trajectory,
    current_trajectory,
    current_where,
    named_branch,
)
from pabc.runtime.where import Where
from pabc.runtime.whole_calls import advise_on
from pabc.schedule import Schedule
from pabc.wrapper import Wrapper


class CompiledModel(Wrapper):
    """A model that follows a schedule. Made by :func:`pabc.compile`; called like the model itself.

    The calls of one generation are its steps, in order; their state is that of the trajectory in
    which they are made: see :meth:`trajectory` and :meth:`cache_context`. Attributes that are not
    its own (`config`, `dtype`, ...) are read from the model, set on it and deleted from it; so is
    its state dict.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        options: Options,
        *,
        programs: Programs | None = None,
        peers: Peers | None = None,
        falls_back: bool = False,
    ) -> None:
        """`falls_back`: whether a model that cannot be captured is called as it is, where the
        schedule reuses nothing but whole calls."""
        super().__init__(model)
        self._schedule = schedule
        self._options = options
        self._peers = peers
        self._listeners: list[Listener] = []
        self._plans: Planning | None = None
        self._take_back: Callable[[], None] | None = None
        own_call = partial(inplace.find_own_call, model)
        self._selection = Selection(model, options, own_call, programs, falls_back=falls_back)
        self._programs.check(schedule)
        self._recorder = self._programs.recorder
        self._last: tuple[ServingProgram, Binding] | None = None
        self._warned: set[tuple[Schedule | None, str]] = set()
        self._has_seen_grad = False
        self._lock = threading.RLock()
        self._default = self.trajectory()
        for _, program in self._programs.items():
            self._bind(program, schedule)
        self._begin_passing_on()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs one diffusion step, with the model's own arguments and result.

        Raises: GuardError where the call contradicts the plan: a step too many, the timestep of
        another step, a trajectory that is in use; :class:`RankError` where ranks that share the
        model do not agree, or another one failed. Whatever is raised, the trajectory is reset.
        """
        if self._programs.runs_hooks:
            return self._run(None, False, *args, **kwargs)
        model: Any = children_of(self)["_orig_mod"]
        if self._peers is None:
            return call_around(model, partial(self._run, None, True), args, kwargs, self.reset)
        with self._peers.step() as step:
            return call_around(model, partial(self._run, step, True), args, kwargs, self.reset)

    def _run(
        self, step_of_ranks: RankStep | None, within_hooks: bool, /, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs one step, in the place of the model's forward, or, unless `within_hooks`, of a call.

        The call is placed in its trajectory, served by a program, and bound to a plan; its branch
        begins a step, which computes and is then committed. See `pabc/runtime/README.md`.
        """
        trajectory = self.current
        with trajectory.running():
            leaves, structure = self._selection.flatten(args, kwargs)
            heard = self._tell_begin(trajectory, leaves, structure) if self._listeners else None
            given = (*args, *kwargs.values())
            branch, schedule, is_sure = trajectory.place(self._schedule, given, structure, leaves)
            with self._lock:
                at_start = branch.last < 0
                program = self._selection.select(
                    args, kwargs, leaves, structure, schedule, at_start=at_start
                )
            inputs = program.pack(leaves, args, kwargs, within_hooks=within_hooks)
            if not self._has_seen_grad and torch.is_grad_enabled():
                self._check_grad()
            grad, autocast, weights = program.contexts(inputs)
            with grad, autocast, weights:
                with self._lock:
                    call = program.serve(inputs, self._bind(program, schedule, inputs))
                    step = branch.begin(call, is_sure=is_sure)
                if step_of_ranks is not None:
                    step_of_ranks.agree(self._facts(program, step))
                with self._lock if program.calls_modules else nullcontext():
                    outputs = step.run()
                step.commit()
                result = program.finish(inputs, outputs)
            if program.writes_to_arguments:
                bound = self._selection.arguments.bind(args, kwargs)
                program.write_to_arguments(bound, leaves, inputs)
            if heard is not None:
                self._tell_end(heard, step, result)
            return result

    def _tell_begin(
        self, trajectory: Trajectory, leaves: Sequence[Any], structure: Structure
    ) -> HeardCall | None:
        """Tells those who listen that a call begins."""
        if trajectory.is_private:
            return None
        where = current_where(self._recorder)
        heard = HeardCall(self, trajectory, where, leaves, structure)
        for listener in tuple(self._listeners):
            listener.begin(heard)
        return heard

    def _tell_end(self, heard: HeardCall, step: ActiveStep, result: Any) -> None:
        """Tells those who listen how a call ended."""
        heard.branch = heard.trajectory.find_key(step.branch)
        heard.step, heard.was_reused = step.index, bool(step.reused)
        for listener in tuple(self._listeners):
            listener.end(heard, result)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Captures this call's signature and compiles all of its phases, without running a step."""
        with self._lock:
            leaves, structure = self._selection.flatten(args, kwargs)
            program = self._selection.select(
                args, kwargs, leaves, structure, self._schedule, at_start=True
            )
            inputs = program.pack(leaves, args, kwargs, within_hooks=True)
            grad, autocast, weights = program.contexts(inputs)
            with grad, autocast, weights:
                program.prepare(self._bind(program, self._schedule, inputs), inputs)

    def trajectory(self, schedule: Schedule | None = None, *, private: bool = False) -> Trajectory:
        """Returns the state of one generation at a time, for `with fast.trajectory(): ...`.

        Any number can be under way at once, in turns or in several threads; each gives what it
        would give alone. `schedule`: what it follows in place of this model's schedule. `private`:
        those who listen, such as a pipeline, are not told of its calls, do not state its steps,
        and `stats` does not count them.

            a, b = fast.trajectory(), fast.trajectory()
            for t in timesteps:
                with a:
                    noise_a = fast(latents_a, t, text_a)
                with b:
                    noise_b = fast(latents_b, t, text_b)
        """
        if schedule is not None:
            self._programs.check(schedule)
        return Trajectory(
            self._recorder,
            Recorder() if private else self._recorder,
            known=self._programs.timesteps,
            schedule=schedule,
            check_finite=self._options.check_finite,
            on_error=None if self._peers is None else self._peers.tell,
            is_private=private,
        )

    @property
    def current(self) -> Trajectory:
        """The trajectory that a call made here, in this thread or task, belongs to."""
        return current_trajectory(self._recorder, self._default)

    @property
    def has_entered_trajectory(self) -> bool:
        """True if a call made here is within `with fast.trajectory():`."""
        return self.current is not self._default

    def cache_context(self, name: str, **where: Any) -> AbstractContextManager[Any]:
        """Names the calls within, where one step makes several: `with fast.cache_context("cond")`.

        Calls of different names share nothing but the step, and a name may be left out at some
        steps. The protocol is that of diffusers' models, some of which also state the position of
        the loop: `step_index` is the step of the calls, whichever came before; what else it states,
        `num_inference_steps`, `sigma` and `timestep`, is checked against the schedule.
        Where the loop states its steps, in this way or with :meth:`Trajectory.at_step`, `repeat`
        states how many calls with the same conditions came before in the step. Other keywords are
        ignored.
        """
        named = named_branch(self._recorder, Where.of(name, **where))
        where.pop("repeat", None)
        return _within(named, self._own_context(name, where))

    def _own_context(self, name: str, where: dict[str, Any]) -> AbstractContextManager[Any]:
        """Returns the model's own `cache_context`, or a context that does nothing."""
        model = self._orig_mod
        own = getattr(type(model), "cache_context", None)
        return nullcontext() if own is None else own(model, name, **where)

    def undo(self) -> None:
        """Restores the own call of a model that was compiled with `inplace=True`."""
        if self._take_back is not None:
            self.reset()
            self._take_back()
            self._take_back = None

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the model itself (:meth:`torch.nn.Module.compile`), where it is called as it is.

        Raises ValueError where it is captured: its phases are compiled already.
        """
        inplace.check_may_compile(self)
        self._orig_mod.compile(*args, **kwargs)

    def install(self, module: nn.Module) -> None:
        """Makes calls of `module`, the model or a wrapper of it, calls of this object."""
        self._take_back = inplace.install(self, module)

    def listen(self, listener: Listener) -> None:
        """Tells `listener` of each call from now on, within the model's hooks."""
        self._listeners.append(listener)

    def follow(self, plans: Planning) -> None:
        """Makes generations follow what `plans` states, until a schedule is set."""
        self._plans = plans
        self.listen(plans)

    def unlisten(self, listener: Listener) -> None:
        """Undoes :meth:`listen`."""
        self._listeners.remove(listener)

    def expect_skips(self) -> None:
        """Makes a model that cannot be captured, or whose graph cannot be skipped as a whole, be
        called as it is, since what it will follow only skips whole calls."""
        self._selection.expect_skips()

    def describe_plan(self, text: str, **counts: int) -> None:
        """Says where the plan comes from, and counts what was done for it, for :attr:`stats`."""
        self._recorder.plan_source = text
        self._recorder.add(**counts)

    @property
    def timestep_arguments(self) -> TimestepArguments:
        """The arguments that are known as timesteps."""
        return self._programs.timesteps

    @property
    def is_sharded(self) -> bool:
        """True if processes share the work of each call."""
        return self._peers is not None

    @property
    def calls_original(self) -> bool:
        """True if nothing is captured, and computed steps call the model as it is."""
        return self._programs.runs_hooks

    @property
    def needs_capture(self) -> bool:
        """True if a model that cannot be captured is refused, whatever the schedule."""
        return not (self._selection.falls_back or self._programs.runs_hooks)

    @property
    def is_listened_to(self) -> bool:
        """True if a pipeline, or what plans by itself, states the steps of this model."""
        return bool(self._listeners)

    def reset(self) -> None:
        """Starts a new generation: the next call is step 0 and finds nothing stored."""
        trajectory = self.current
        trajectory.reset()
        if self._plans is not None:
            self._plans.end_generation(trajectory)

    @property
    def schedule(self) -> Schedule:
        """The schedule. A new one takes effect where the next generation starts."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a pabc.Schedule, found {type(schedule).__name__}")
        self._programs.check(schedule)
        if self._plans is not None:
            self.unlisten(self._plans)
            self._plans.detach()
            self._plans = None
            self._recorder.plan_source = GIVEN
        with self._lock:
            self._schedule = schedule
            if self._last is not None:
                self._bind(self._last[0], schedule)

    @property
    def stats(self) -> Stats:
        """Counts of what was computed, reused and stored so far, and of the bytes held."""
        return self._recorder.snapshot()

    @property
    def plan(self) -> Plan:
        """The schedule bound to this model's slots."""
        return self._captured("plan")[1].plan

    @property
    def phases(self) -> tuple[GraphModule, ...]:
        """The specialized modules, one per phase of the plan, in the plan's order.

        Each maps the model's flattened arguments, the hoisted values and the reused cuts to (the
        model's flattened outputs, the stored cuts). Computed regions are submodules that it calls.
        """
        program, binding = self._captured("phases")
        with self._lock:
            return program.specialize(binding)

    def explain(self) -> Explanation:
        """Returns what was found in the model, and the plan."""
        program, binding = self._captured("explain()")
        found = program.explain(binding, self._schedule.unmatched(program.slots))
        source = self._recorder.plan_source
        return found if source == GIVEN else replace(found, plan_source=source)

    def dump(self, folder: str | Path) -> Path:
        """Writes to `folder` the graph after each stage, of each phase too, a table of stages with
        nodes and seconds, the plan, and what was found."""
        program, binding = self._captured("dump()")
        target = Path(folder)
        with self._lock:
            if isinstance(program, Program):
                write_dump(target, program, binding, self.explain())
            else:
                write_plan(target, binding, self.explain())
        return target

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes graphs, schedule and compiled code to a file, for :func:`pabc.load`; no weights.

        The file holds every phase of the schedule, for each kind of call seen so far. Phases that
        did not run yet are compiled, and serve this process as well. Code for GPUs is compiled once
        more: what this process runs serves it alone. Other threads' steps wait. The file is written
        whole or not at all.

        Raises: ArtifactError for what cannot be saved; it names the node, argument or option.
        """
        if not isinstance(self._programs, Programs):
            raise ArtifactError(
                "backend: expected one that captures the model, found 'original', which compiles "
                "nothing that a file could hold; save the schedule: Schedule.to_json"
            )
        with self._lock:
            last, _ = self._captured("save()")
            assert isinstance(last, Program)
            write_artifact(path, self._orig_mod, self._planned(), self._programs, last=last)

    def _planned(self) -> Schedule:
        """Returns the schedule to save: what was set, or, with pabc.auto, what was planned last."""
        schedule = self._schedule if self._plans is None else self._plans.schedule()
        if schedule is None:
            raise ArtifactError(
                "schedule: expected a plan to save, found none yet; run a generation, then reset()"
            )
        return schedule

    def warn_once(self, schedule: Schedule | None, text: str) -> None:
        """Warns once for this schedule; for None, once for this model."""
        if (schedule, text) not in self._warned:
            self._warned.add((schedule, text))
            warnings.warn(text, stacklevel=6)

    @property
    def _programs(self) -> ServingPrograms:
        return self._selection.programs

    def _check_grad(self) -> None:
        """Warns where the caller may expect gradients of the weights."""
        self._has_seen_grad = True
        if any(parameter.requires_grad for parameter in self._orig_mod.parameters()):
            results = "results of skipped calls" if self._programs.runs_hooks else "results"
            self.warn_once(
                None,
                f"pabc runs inference: {results} have no grad_fn, though gradients are enabled and "
                "weights require them; call within torch.no_grad(), or model.requires_grad_(False)",
            )

    def _captured(self, what: str) -> tuple[ServingProgram, Binding]:
        if self._last is None:
            raise RuntimeError(
                f"{what}: nothing is captured yet; call the model once, or give example_inputs"
            )
        return self._last

    def _bind(
        self, program: ServingProgram, schedule: Schedule, inputs: list[Any] | None = None
    ) -> Binding:
        """Returns the schedule bound to the program, which `plan` and `explain` then describe."""
        binding = program.bind(schedule, inputs)
        if self._last is None or self._last[1] is not binding:
            self._last = program, binding
            missing = schedule.unmatched(program.slots)
            is_vain = schedule.reuses and not binding.plan.reuse.any()
            if missing or is_vain:
                kinds = sorted({slot.kind for slot in program.slots})
                what = (
                    f"the schedule asks for {', '.join(missing)}, which this model does not have; "
                    f"it has {kinds}"
                    if missing
                    else "the schedule's overrides take back what its masks ask for"
                )
                vain = "; nothing can be reused" if is_vain else ""
                asked = [kind for kind in COARSE if f"kind {kind!r}" in missing]
                reasons = "".join(
                    f"; left out: {line}" for line in program.left_out if line.startswith((*asked,))
                )
                self.warn_once(schedule, f"pabc: {what}{vain}{reasons}{advise_on(missing)}")
        return binding

    def _facts(self, program: ServingProgram, step: ActiveStep) -> dict[str, str]:
        """Returns what must be the same on all ranks that share the model; values, where a
        generation starts."""
        tensors = [x for x in step.inputs if isinstance(x, torch.Tensor)]
        is_first = step.index == 0 and step.branch.is_scheduled
        return {
            "step": str(step.index) if step.branch.is_scheduled else "none of the schedule",
            "inputs": ", ".join(f"{list(x.shape)} {x.dtype}" for x in tensors),
            "plan": step.binding.plan.digest()[:12],
            "reused slots": str(step.reused),
            **program.facts(step.inputs, with_values=is_first),
        }


@contextmanager
def _within(*contexts: AbstractContextManager[Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
