"""The functions that users call: :func:`compile`, :func:`explain` and :func:`load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from pabc import passes
from pabc.artifact.files import FilePath, read_artifact
from pabc.base.arguments import bind_call
from pabc.base.forward import inner_forward
from pabc.compiled import CompiledModel
from pabc.explanation import Explanation, describe
from pabc.inplace import check_place
from pabc.internals.dynamo import compile_lock
from pabc.options import Backend, DisabledStage, Offload, Options
from pabc.passes import refuse_hooks
from pabc.pipeline import analyze, trace_phase
from pabc.planning import SelfPlanning
from pabc.runtime.bindings import Bindings
from pabc.runtime.peers import Peers
from pabc.runtime.whole_calls import advise
from pabc.schedule import Schedule


def compile(
    model: nn.Module,
    schedule: Schedule | SelfPlanning,
    *,
    backend: Backend = "inductor",
    cut: passes.Cut = "attention",
    kinds: Mapping[str, str] | None = None,
    latents: str | None = None,
    dynamic: bool = False,
    cache_dtype: passes.CacheDtype = "keep",
    offload: Offload | None = None,
    memory_budget: int | str | None = None,
    cudagraphs: bool = False,
    kernels: passes.Kernels = "auto",
    mesh: DeviceMesh | None = None,
    shard: int | None = None,
    output: passes.Output = "full",
    disable: Sequence[DisabledStage] = (),
    check_finite: bool = False,
    example_inputs: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    inplace: bool = False,
) -> CompiledModel:
    """Makes a diffusion transformer reuse attention (and MLP) branches across diffusion steps.

    Args:
        model: the transformer, in eval mode; left as it is, its parameters shared.
        schedule: which kinds of region are reused at which steps; :func:`pabc.auto` finds out.
        backend: `"inductor"`; `"eager"`: runs the specialized graphs op by op, which gives the
            model's own bits where nothing is reused; `"oracle"`: runs the guarded graph,
            unspecialized; `"original"`: captures nothing, and calls the model itself, hooks and
            all, at the steps that the schedule computes: it can reuse kind `"model"` alone. Of
            the options below, those that say how a graph is captured or compiled do not go with it.
        cut: the value kept of a region. `"attention"`: the last one before the timestep's gate;
            `"branch"`: the value added to the residual stream.
        kinds: patterns of qualified module names (fnmatch) -> kind, where you know better.
        latents: the name of the denoised input, if it is not the first that comes out again.
        dynamic: captures dynamic shapes: one capture serves all sizes of the inputs for which the
            model does the same. The bytes in the plan are those of the call under way.
            `backend="inductor"` still compiles for each shape.
        cache_dtype: the form in which slots hold floating-point values: `"keep"`, their own;
            `"bf16"`; `"fp8"`, e4m3 with a float32 scale for each token. Steps that compute a
            region continue with its exact values.
        offload: `"cpu"`: slots of a model on a CUDA device lie in pinned host memory; each is
            copied to the device, beside the computation, shortly before it is used.
        memory_budget: bytes, as an integer or as text ("2GiB"), that the slots of one branch of a
            generation may take at the fullest step: those that save the most work per byte are
            kept, the other regions computed at every step. Two guidance calls a step are two
            branches.
        cudagraphs: on a CUDA device, each phase becomes a CUDA graph once it has run twice, so that
            small models do not wait for launches. Inputs are copied to where the graph reads them,
            and outputs are copies. The memory of slots and phases is kept between generations, for
            each branch under way. Replacing a weight re-captures the CUDA graphs.
        kernels: Triton kernels in place of PyTorch's ops: `"auto"`, where a measured table says
            that they are faster on the device; `"off"`; `"force"`, wherever one computes the same
            (on a CPU their references run, or, with `TRITON_INTERPRET=1`, Triton's interpreter).
        mesh: processes that share the work of each call: a
            :class:`torch.distributed.device_mesh.DeviceMesh` of one dimension, over which tokens
            are sharded, or of two: the batch (guidance branches, or videos) is sharded over the
            first, tokens over the second. Every rank makes the same calls, in the same order, with
            the same, whole inputs. Collectives are part of regions: a step that reuses one makes
            none for it.
        shard: with a mesh, the dimension of the latents that is sharded; by default, the token
            dimension for which a rank sends the fewest bytes under the schedule with which a kind
            of call is first made (a schedule set later keeps it).
        output: with a mesh, `"full"`: every rank gets the whole of the model's outputs;
            `"sharded"`: its own part of the sharded dimension, padded on the last ranks so that all
            parts have one size.
        disable: names of stages to leave out, so that a fault can be bisected: none of `"hoist"`,
            `"repeats"`, `"encode"`, `"offload"`, `"formulas"`, `"onednn"`, `"lower"` and
            `"blocks"` is needed for results to be right (:mod:`pabc.pipeline`).
        check_finite: raises :class:`pabc.GuardError` for a NaN or infinity that would be kept; the
            check waits for the device at each step that stores.
        example_inputs: `(args, kwargs)` of a call: captures and compiles now, not when called.
        inplace: compiles in place, as :meth:`torch.nn.Module.compile` does: calls of the model
            itself follow the schedule, until `undo()` of what is returned.

    Returns:
        A module with the model's own call signature and output type. The calls of one generation
        are its steps, in order. Hooks of the model run around each call, as they do without pabc.

    Raises:
        TypeError: `model` is no module, or `schedule` no :class:`pabc.Schedule`.
        ValueError: an option is not among those allowed, or the model cannot be compiled; the
            message names the node and the reason.

    Source: Pyramid Attention Broadcast, arXiv 2408.12588.
    """
    options = Options.of(
        backend=backend,
        cut=cut,
        kinds=kinds,
        latents=latents,
        dynamic=dynamic,
        cache_dtype=cache_dtype,
        offload=offload,
        memory_budget=memory_budget,
        cudagraphs=cudagraphs,
        kernels=kernels,
        mesh=mesh,
        shard=shard,
        output=output,
        disable=disable,
        check_finite=check_finite,
    )
    return _build(
        model, schedule, options, mesh=mesh, example_inputs=example_inputs, inplace=inplace
    )


def compile_or_call(
    model: nn.Module,
    schedule: Schedule,
    *,
    mesh: DeviceMesh | None = None,
    example_inputs: tuple[Sequence[Any], Mapping[str, Any]] | None = None,
    **options: Any,
) -> CompiledModel:
    """Compiles a model as :func:`compile` does, but one that cannot be captured is called as it is
    (`backend="original"`) where the schedule reuses nothing but whole calls; this is logged."""
    return _build(
        model,
        schedule,
        Options.of(mesh=mesh, **options),
        mesh=mesh,
        example_inputs=example_inputs,
        falls_back=True,
    )


def _build(
    model: nn.Module,
    given: Schedule | SelfPlanning,
    options: Options,
    *,
    mesh: DeviceMesh | None,
    example_inputs: tuple[Sequence[Any], Mapping[str, Any]] | None,
    inplace: bool = False,
    falls_back: bool = False,
) -> CompiledModel:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    if not isinstance(given, Schedule | SelfPlanning):
        raise TypeError(
            f"schedule: expected a pabc.Schedule, found {type(given).__name__}; "
            "see pabc.auto, pabc.Schedule.pyramid and pabc.presets"
        )
    schedule = given if isinstance(given, Schedule) else Schedule.none((0,))
    falls_back = falls_back or isinstance(given, SelfPlanning)
    peers = None if mesh is None else Peers(mesh)
    if options.backend != "original":
        if inplace:
            check_place(model)
        if not falls_back:
            refuse_foreign_hooks(model, schedule)
    compiled = CompiledModel(model, schedule, options, peers=peers, falls_back=falls_back)
    if isinstance(given, SelfPlanning):
        given.attach(compiled)
    if example_inputs is not None:
        args, kwargs = example_inputs
        compiled.prepare(*args, **kwargs)
    if inplace:
        compiled.install(model)
    return compiled


def refuse_foreign_hooks(model: nn.Module, schedule: Schedule) -> None:
    """Raises ValueError for a hook of another library that a graph cannot stand for."""
    try:
        refuse_hooks(model)
    except ValueError as error:
        advised = advise(error, schedule)
        if advised is None:
            raise
        raise advised from error


def explain(
    model: nn.Module,
    *args: Any,
    kinds: Mapping[str, str] | None = None,
    latents: str | None = None,
    cut: passes.Cut = "attention",
    schedule: Schedule | None = None,
    cache_dtype: passes.CacheDtype = "keep",
    offload: Offload | None = None,
    memory_budget: int | str | None = None,
    ranks: int | tuple[int, ...] | None = None,
    shard: int | None = None,
    **kwargs: Any,
) -> Explanation:
    """Returns what :func:`compile` would find in `model` when called with these arguments.

    With a schedule, this includes what each step does, and the memory that slots take. Nothing runs
    and nothing is compiled: the model and the arguments may be on the meta device.

    `ranks` explains one of so many processes, or of a mesh of two such sizes, none of which need
    exist. `shard` and the other options are those of :func:`compile`.

    Raises: ValueError as :func:`compile` does.
    """
    options = Options.of(
        cut=cut,
        kinds=kinds,
        latents=latents,
        cache_dtype=cache_dtype,
        offload=offload,
        memory_budget=memory_budget,
        ranks=ranks,
        shard=shard,
        schedule=schedule,
    )
    return explain_call(model, args, kwargs, options, schedule)


def explain_call(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    schedule: Schedule | None = None,
    *,
    traces_phase: bool = False,
) -> Explanation:
    """Explains a call as :func:`explain` does, given its options as one object.

    `traces_phase`: the stages of the phase that reuses nothing are run, and listed, as well.
    """
    bound = bind_call(inner_forward(model), args, kwargs)
    with compile_lock():
        guarded, records = analyze(model, *bound, options)
        if traces_phase:
            records += trace_phase(guarded, options)
    found = describe(guarded, stages=records)
    if schedule is None:
        return found
    bindings = Bindings(guarded, options.memory_budget)
    bound_to = bindings.get(schedule, (), None)
    unmatched = schedule.unmatched(bindings.slots)
    return replace(found, plan=bound_to.plan, fit=bound_to.fit, unmatched=unmatched)


def load(path: FilePath, model: nn.Module) -> CompiledModel:
    """Loads a compiled model that was saved; it uses `model` and its weights.

    It behaves like one just compiled: calls that the file has no graph for are captured, and phases
    that it has no code for are compiled, when they are first needed.

    Raises: :class:`ArtifactError` if the file is damaged, or was made by other versions, on other
    hardware or for a model of another structure; FileNotFoundError. The file is data and machine
    code: nothing in it is unpickled or imported. As with any library, load only what you trust.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    saved = read_artifact(path, model)
    return CompiledModel(model, saved.schedule, saved.options, programs=saved.programs)
