"""Compiles whole diffusers pipelines, without importing diffusers.

The pipeline's transformers follow a schedule of the timesteps that the scheduler runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from types import MappingProxyType, TracebackType
from typing import Any

from torch import nn

from pabc.api import compile, compile_or_call
from pabc.compiled import CompiledModel
from pabc.inplace import check_place, is_installed, prefer
from pabc.passes import (
    refuse_hooks,
)
from pabc.pipelines.generation import Generation
from pabc.pipelines.given import GivenPlans, ScheduleSource
from pabc.pipelines.scheduler import follow
from pabc.planning import SelfPlanning
from pabc.runtime.listening import HeardCall
from pabc.schedule import Schedule

logger = logging.getLogger(__name__)


def compile_pipeline(
    pipe: Any,
    schedule: ScheduleSource | SelfPlanning,
    *,
    components: Iterable[str] | None = None,
    **options: Any,
) -> CompiledPipeline:
    """Makes a diffusers pipeline reuse attention (and MLP) branches across its steps.

    In place: the pipeline's transformers stay what they are, and their calls follow the schedule,
    until `undo()`, or the end of a `with` block. Call what is returned as you would the pipeline:

        with pabc.compile_pipeline(pipe, "latte") as fast_pipe:
            video = fast_pipe(prompt, num_inference_steps=30).frames

    Args:
        pipe: a pipeline with a `scheduler` that has `set_timesteps`, `timesteps` and `step`.
        schedule: called with the timesteps that run, at the start of each generation: a preset, its
            name, or `lambda ts: pabc.Schedule.pyramid(ts, spatial=2)`. A :class:`pabc.Schedule`
            must have the timesteps that run; :func:`pabc.auto` makes its own. Steps are the
            scheduler's: of a second-order one, such as Heun, each call of the model is one.
            One that only skips whole calls (kind `"model"`) works for every model: one that cannot
            be captured is called as it is, as with `backend="original"`, and a warning is logged.
        components: the names of the modules that are called with the denoised latents; by default
            all whose name has "transformer" in it, as diffusers registers them.
        options: those of :func:`pabc.compile` but for `inplace`. Without any, a component that is a
            compiled model already (from :func:`pabc.compile` or :func:`pabc.load`) is used as it
            is, and nothing of it is recaptured or recompiled.

    Raises:
        TypeError, ValueError: no such component, a wrong schedule or option, a hook of another
            library that pabc cannot run with; where this depends on the schedule, when called.
        GuardError: when called, for timesteps that are not those of a fixed schedule.
    """
    return CompiledPipeline(pipe, schedule, components, options)


class CompiledPipeline:
    """A pipeline whose transformers follow a schedule. Made by :func:`compile_pipeline`.

    Called like the pipeline. Each call has trajectories of its own, and frees all they keep when it
    ends, is interrupted or raises; calls in several threads are as safe as they are without pabc
    (a pipeline's own scheduler counts the steps of one loop at a time). `pipe(...)` runs compiled
    too, but if it raises, what it kept stays until its next call, or `undo()`.

    Other attributes are the pipeline's, to read and to set.

    Attributes:
        pipe: the pipeline.
        models: name -> compiled model.
    """

    pipe: Any
    models: Mapping[str, CompiledModel]

    def __init__(
        self,
        pipe: Any,
        schedule: ScheduleSource | SelfPlanning,
        components: Iterable[str] | None,
        options: Mapping[str, Any],
    ) -> None:
        given = None if isinstance(schedule, SelfPlanning) else GivenPlans(schedule)
        parts = find_denoisers(pipe, components)
        _check_scheduler(pipe)
        models = {name: _compiled(part, options) for name, part in parts.items()}
        own = vars(self)
        own["_plans"] = given or schedule.plans_for(models)  # type: ignore[union-attr]
        self._check_hooks(models)
        own.update(pipe=pipe, models=MappingProxyType(models), _parts=parts)
        own.update(_scheduler=None, _leave=None, _listener=_Listener(self))
        own["_default"] = Generation(self._plans.course(), self._observed, self._take_turn)
        self._observe()
        for name, model in models.items():
            model.listen(self._listener)
            if model is not parts[name]:
                model.install(parts[name])

    def _check_hooks(self, models: Mapping[str, CompiledModel]) -> None:
        """Raises ValueError for a hook that no graph can stand for, where a graph is needed."""
        for name, model in models.items():
            try:
                refuse_hooks(model._orig_mod)
            except ValueError as error:
                if model.needs_capture or self._plans.needs_capture:
                    raise ValueError(f"{name}: {error}") from error

    def _check_parts(self) -> None:
        """Raises ValueError where calls of the pipeline do not come to the compiled models."""
        for name, part in self._parts.items():
            found, model = getattr(self.pipe, name, part), self.models[name]
            if found is not part:
                where = f"another {type(found).__name__} in its place"
            elif model is not part and not is_installed(model, part):
                where = "another call of it, as torch.nn.Module.compile makes"
            else:
                continue
            raise ValueError(
                f"{name}: expected the module that compile_pipeline compiled, found {where}; call "
                "undo(), and compile_pipeline again (what torch.compile makes is run with "
                "backend='original' alone)"
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the pipeline."""
        if self._leave is None:
            raise RuntimeError("expected a compiled pipeline, found one that was undone")
        self._observe()
        self._check_parts()
        self._check_hooks(self.models)
        generation = Generation(self._plans.course(), self._observed)
        with ExitStack() as stack:
            for model in self.models.values():
                stack.enter_context(model.trajectory())
            stack.enter_context(_running(self, generation))
            return self.pipe(*args, **kwargs)

    def undo(self) -> None:
        """Gives the pipeline back as it was. A component that was replaced since stays so."""
        if self._leave is None:
            return
        self.reset()
        self._leave()
        for name, model in self.models.items():
            model.unlisten(self._listener)
            if model is not self._parts[name]:
                model.undo()
        vars(self).update(_leave=None, _scheduler=None)

    def reset(self) -> None:
        """Frees what a `pipe(...)` that raised has kept."""
        self._default.abandon()

    def to(self, *args: Any, **kwargs: Any) -> CompiledPipeline:
        """Moves or casts the components, as the pipeline's own method does."""
        self.pipe.to(*args, **kwargs)
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Saves the pipeline. Meanwhile, components that were compiled models are replaced by their
        models: the pipeline's own method looks at the classes of components."""
        given = {n: part for n, part in self._parts.items() if isinstance(part, CompiledModel)}
        for name, part in given.items():
            _replace(self.pipe, name, part._orig_mod)
        try:
            return self.pipe.save_pretrained(*args, **kwargs)
        finally:
            for name, part in given.items():
                _replace(self.pipe, name, part)

    def __enter__(self) -> CompiledPipeline:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __getattr__(self, name: str) -> Any:
        if "pipe" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["pipe"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipe, name, value)

    def _take_turn(self) -> None:
        """Makes calls of models that pipelines share this pipeline's, since its loop begins."""
        for name, part in self._parts.items():
            prefer(self.models[name], part)

    def _generation(self) -> Generation:
        """Returns the generation of the call in this thread, or task; else that of `pipe(...)`."""
        running = (generation for owner, generation in reversed(_RUNNING.get()) if owner is self)
        return next(running, self._default)

    def _observed(self) -> Any:
        """Returns the pipeline's scheduler; follows it if it was replaced."""
        self._observe()
        return self._scheduler

    def _observe(self) -> None:
        if self.pipe.scheduler is not self._scheduler:
            if self._leave is not None:
                self._leave()
            scheduler = self.pipe.scheduler
            vars(self).update(_scheduler=scheduler, _leave=follow(scheduler, self._generation))


class _Listener:
    """Puts each call of a pipeline's models at the step that its loop is at."""

    def __init__(self, pipeline: CompiledPipeline) -> None:
        self._pipeline = pipeline

    def begin(self, call: HeardCall) -> None:
        """States the step of a call."""
        self._pipeline._generation().begin_call(call)

    def end(self, call: HeardCall, result: Any) -> None:
        """Passes on what a call came to."""
        self._pipeline._generation().end_call(call, result)


_RUNNING: ContextVar[tuple[tuple[CompiledPipeline, Generation], ...]] = ContextVar(
    "running", default=()
)


def _compiled(model: nn.Module, options: Mapping[str, Any]) -> CompiledModel:
    """Returns the model compiled; itself if it is compiled and no pipeline uses it."""
    if isinstance(model, CompiledModel) and not options and not model.is_listened_to:
        return model
    nothing = Schedule.none((0,))
    if options.get("backend") == "original":
        own = model._orig_mod if isinstance(model, CompiledModel) else model
        return compile(own, nothing, **options)
    check_place(model)
    own = getattr(model, "_orig_mod", model)
    if own is not model and not isinstance(model, CompiledModel):
        logger.warning(
            "what torch.compile made of %s is not used: a graph runs in its place, which pabc "
            "compiles itself (backend='inductor')",
            type(own).__name__,
        )
    return compile_or_call(own, nothing, **options)


def _check_scheduler(pipe: Any) -> None:
    scheduler = getattr(pipe, "scheduler", None)
    missing = [name for name in ("set_timesteps", "step") if not hasattr(scheduler, name)]
    if missing:
        raise TypeError(
            f"pipe.scheduler: expected one with set_timesteps and step, found "
            f"{type(scheduler).__name__} without {' and '.join(missing)}"
        )


@contextmanager
def _running(owner: CompiledPipeline, generation: Generation) -> Iterator[None]:
    """Makes the generation the one that this thread, or task, runs; frees its state in the end."""
    outer = _RUNNING.get()
    _RUNNING.set((*outer, (owner, generation)))
    try:
        yield
        generation.end()
    finally:
        generation.abandon()
        _RUNNING.set(outer)


def find_denoisers(pipe: Any, names: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Returns the modules of a pipeline that are called with the denoised latents, by name.

    They are those in `names`, or all that are registered under a name with "transformer" in it, as
    diffusers names them: `transformer`, `transformer_2`, `unconditional_transformer`.
    """
    found = getattr(pipe, "components", None) or vars(pipe)
    modules = {name: part for name, part in found.items() if isinstance(part, nn.Module)}
    chosen = [name for name in modules if "transformer" in name] if names is None else list(names)
    for name in chosen:
        if name not in modules:
            known = ", ".join(modules) or "of which there are none"
            raise ValueError(f"components: expected names of modules, {known}, found {name!r}")
    if not chosen:
        raise ValueError(
            "components: expected a module named as a transformer, found "
            f"{', '.join(modules) or 'no modules'}; name those that are called with the denoised "
            "latents"
        )
    return {name: modules[name] for name in chosen}


def _replace(pipe: Any, name: str, module: nn.Module) -> None:
    """Puts another module in a component's place; what the pipeline has registered stays."""
    if name in vars(pipe):
        vars(pipe)[name] = module
    else:
        setattr(pipe, name, module)
