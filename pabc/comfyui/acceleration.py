"""Makes the runs of a model patcher skip calls of its diffusion model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from pabc.api import compile
from pabc.comfyui.calls import HostCall
from pabc.comfyui.denoiser import CompiledDenoiser, Denoiser
from pabc.comfyui.interrupt import Interrupted, check
from pabc.comfyui.rules import AUTO, make_plans
from pabc.comfyui.run import Report, Run
from pabc.comfyui.sampler import describe
from pabc.comfyui.sigmas import Sigmas
from pabc.comfyui.standin import call_around
from pabc.compiled import CompiledModel
from pabc.options import Backend
from pabc.planning import PipelinePlans
from pabc.schedule import Schedule

logger = logging.getLogger(__name__)

KEY = "pabc"
"""The name under which the host knows the wrappers and, within a run, the run."""


class Acceleration:
    """What one node does to the model patchers that it returns, and to clones of these.

    Nothing is kept between runs but plans and compiled code; each run has values of its own.

    Attributes:
        report: what the last run did; None: there was none.
    """

    def __init__(self, speedup: float, rule: str, backend: Backend | None) -> None:
        """`backend`: with which the diffusion model is compiled; None: it is not."""
        self.report: Report | None = None
        self._speedup, self._rule, self._backend = speedup, rule, backend
        self._model: CompiledModel | None = None
        self._plans: PipelinePlans | None = None
        self._denoiser: CompiledDenoiser | None = None
        self._runs: dict[Run, Any] = {}
        """Run under way -> the patcher that it is a run of."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        """Returns this very object: nodes may copy the options of a run, which hold its methods."""
        return self

    def attach(self, patcher: Any) -> Any:
        """Returns a clone of a model patcher whose runs are accelerated by this and nothing else of
        pabc."""
        clone = patcher.clone()
        for kind, wrapper in (("sampler_sample", self.sample), ("apply_model", self.apply)):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        clone.remove_callbacks_with_key("on_detach_after", KEY)
        clone.add_callback_with_key("on_detach_after", KEY, self.release)
        return clone

    def sample(
        self, executor: Any, guider: Any, sigmas: Any, extra: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs a sampler, in the place of the host; its calls find the run in their options."""
        run = self._begin(executor.class_obj, guider, sigmas)
        if run is None:
            return executor(guider, sigmas, extra, *args, **kwargs)
        options = extra["model_options"]["transformer_options"]  # the host's copy for this run
        options[KEY] = run
        self._runs[run] = guider.model_patcher
        try:
            result = executor(guider, sigmas, extra, *args, **kwargs)
            run.finish()
            return result
        except Interrupted as interrupted:
            raise interrupted.error from None
        finally:
            run.abandon()
            self._runs.pop(run, None)
            options.pop(KEY, None)

    def apply(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the model, in the place of the host; its diffusion model is called, or skipped."""
        model = executor.class_obj
        run: Run | None = _find_options(args, kwargs).get(KEY)
        if run is not None and getattr(self._runs.get(run), "model", None) is not model:
            run = None
        if run is None and self._denoiser is None:
            return executor(*args, **kwargs)
        call = partial(self._call, run, model.diffusion_model)
        return call_around(executor, model, call, args, kwargs)

    def _call(self, run: Run | None, own: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls the diffusion model, or skips the call."""
        denoiser = self._denoiser
        function = own if denoiser is None or denoiser.model is not own else denoiser
        if run is None or not run.is_followed:
            return function(*args, **kwargs)
        call = HostCall(partial(_call_unless_interrupted, run, function), kwargs)
        if call.has_control and self._rule == AUTO:
            run.leave("it uses a ControlNet, whose values are not recorded; use a skip rule")
        return run.call(call, *args, **kwargs)

    def release(self, patcher: Any, unpatch_all: bool = True) -> None:
        """Frees what runs of a patcher keep, when the host unloads its model while they run.

        `unpatch_all`: False where the model stays, and serves another patcher.
        """
        for run, owner in tuple(self._runs.items()):
            if owner is patcher and unpatch_all:
                run.leave("the host unloads the model")

    def _begin(self, sampler: Any, guider: Any, sigmas: Any) -> Run | None:
        """Returns the run that begins; None: it is not followed."""
        host = guider.model_patcher.model
        self._set_up(host.diffusion_model)
        assert self._model is not None and self._plans is not None
        if any("hooks" in cond for conds in guider.conds.values() for cond in conds or ()):
            logger.warning("pabc: a run is computed in full: its conditions change the weights")
            return None
        try:
            levels = Sigmas(sigmas.tolist())
        except ValueError as error:
            logger.warning("pabc: a run is computed in full: %s", error)
            return None
        run = Run(self._model, self._plans.course(), levels, describe(sampler, guider, host))
        self.report = run.report
        return run

    def _set_up(self, diffusion_model: nn.Module) -> None:
        """Prepares for a diffusion model, if it is not the one of the run before."""
        known = None if self._model is None else self._model._orig_mod.model
        if known is not diffusion_model:
            nothing = Schedule.none((0,))
            self._model = compile(Denoiser(diffusion_model), nothing, backend="original")
            self._plans = make_plans(self._rule, self._speedup, self._model)
            if self._backend is not None:
                self._denoiser = CompiledDenoiser(diffusion_model, self._backend)


def find_acceleration(patcher: Any) -> Acceleration | None:
    """Returns what accelerates the runs of a patcher; None: nothing of pabc."""
    for wrapper in patcher.get_wrappers("sampler_sample", KEY):
        return wrapper.__self__
    return None


def _call_unless_interrupted(
    run: Run, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Calls the diffusion model; once the run is over, such calls are those of plans."""
    if not run.is_followed:
        check()
    return function(*args, **kwargs)


def _find_options(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the host's options for one call of its model."""
    given = kwargs.get("transformer_options")
    if isinstance(given, Mapping):
        return given
    found = (each for each in args if isinstance(each, dict) and "cond_or_uncond" in each)
    return next(found, {})
