"""What users call: :func:`compile`, :func:`explain` and :func:`load`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from pabc import passes
from pabc.artifact.files import Path, read_artifact
from pabc.base.arguments import bind_call
from pabc.base.forward import inner_forward
from pabc.compiled import CompiledModel
from pabc.explanation import Explanation, describe
from pabc.inplace import check_place
from pabc.options import Backend, DisabledStage, Offload, Options
from pabc.passes import refuse_hooks
from pabc.pipeline import analyze, trace_phase
from pabc.runtime.bindings import Bindings
from pabc.runtime.peers import Peers
from pabc.runtime.phases import compiling
from pabc.schedule import Schedule


def compile(
    model: nn.Module,
    schedule: Schedule,
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
        schedule: which kinds of region are reused at which steps.
        backend: `"inductor"`; `"eager"`: the specialized graphs, not compiled further, the model's
            own bits where nothing is reused; `"oracle"`: the guarded graph, unspecialized.
        cut: what is kept of a region. `"attention"`: the last value before the timestep's gate;
            `"branch"`: the value added to the residual stream.
        kinds: patterns of qualified module names (fnmatch) -> kind, where you know better.
        latents: the name of the denoised input, where it is not the first that comes out again.
        dynamic: one capture serves all sizes of the tensors for which the model does the same;
            the plan's bytes are those of the call at hand. `backend="inductor"` still compiles per
            size.
        cache_dtype: the form in which slots hold floating-point values: `"keep"`, their own;
            `"bf16"`; `"fp8"`, e4m3 with a float32 scale for each token. Steps that compute a
            region go on with its exact values.
        offload: `"cpu"`: slots of a model on a CUDA device lie in pinned host memory; each is
            copied to the device, beside the computation, shortly before it is used.
        memory_budget: bytes, as an integer or as text ("2GiB"), that the slots of one branch of a
            generation may take at the fullest step: those that save the most work per byte are
            kept, the other regions computed at every step. Two guidance calls a step are two
            branches.
        cudagraphs: on a CUDA device, each phase becomes a CUDA graph once it has run twice, so that
            small models do not wait for launches. Inputs are copied to where the graph reads them,
            and outputs are copies. The memory of slots and phases is kept between generations, per
            branch that is under way; weights that move are recorded anew.
        kernels: Triton kernels in place of PyTorch's ops: `"auto"`, where a measured table says
            that they are faster on the device; `"off"`; `"force"`, wherever one computes the same
            (on a CPU their references run, or, with `TRITON_INTERPRET=1`, Triton's interpreter).
        mesh: processes among which each call is divided: a
            :class:`torch.distributed.device_mesh.DeviceMesh` of one dimension, which divides
            tokens, or of two, of which the first divides the batch (the guidance branches that lie
            in it, or videos) and the second tokens. Every rank makes the same calls, in the same
            order, with the same, whole, inputs. What ranks send lies in the regions: a step that
            reuses one sends nothing for it.
        shard: with a mesh, which dimension of the latents is divided; by default, the token
            dimension for which a rank sends the fewest bytes under the schedule with which a kind
            of call is first made (a schedule set later keeps it).
        output: with a mesh, `"full"`: every rank gets the whole of the model's outputs;
            `"sharded"`: its positions of what is divided, the last ranks' padded so that all are as
            large.
        disable: names of stages to leave out, so that a fault can be bisected: none of `"hoist"`,
            `"repeats"`, `"encode"`, `"offload"`, `"formulas"`, `"onednn"`, `"lower"` and
            `"blocks"` is needed for results to be right (:mod:`pabc.pipeline`).
        check_finite: a NaN or infinity that would be kept raises :class:`pabc.GuardError`; looking
            for one waits for the device at each step that stores.
        example_inputs: `(args, kwargs)` of a call: captures and compiles now, not when called.
        inplace: as :meth:`torch.nn.Module.compile` does: the model stays what it is, and its own
            call follows the schedule, until `undo()` of what is returned.

    Returns:
        A module with the model's own call signature and output type. The calls of one generation
        are its steps, in order. Hooks of the model run around each call, as they do without pabc.

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
    peers = None if mesh is None else Peers(mesh)
    if inplace:
        check_place(model)
    refuse_hooks(model)
    compiled = CompiledModel(model, schedule, options, peers=peers)
    if example_inputs is not None:
        args, kwargs = example_inputs
        compiled.prepare(*args, **kwargs)
    if inplace:
        compiled.install(model)
    return compiled


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
    """What :func:`compile` would find in `model` when called with these arguments.

    With a schedule, also what it would do at each step, and the memory that its slots take. Nothing
    runs and nothing is compiled: the model and the arguments may lie on the meta device. `ranks`:
    for each of so many processes, or of a mesh of two such sizes, none of which need be there;
    `shard` as for :func:`compile`.

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
    with compiling():
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


def load(path: Path, model: nn.Module) -> CompiledModel:
    """The compiled model that was saved, around `model`, whose weights it uses.

    It is as if just compiled: what the file has no graph for is captured, and what it has no code
    for is compiled, when it is called for.

    Raises: :class:`ArtifactError` if the file is damaged, or was made by other versions, on other
    hardware or for a model of another structure; FileNotFoundError. The file is data and machine
    code: nothing in it is unpickled or imported. As with any library, load only what you trust.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, found {type(model).__name__}")
    saved = read_artifact(path, model)
    return CompiledModel(model, saved.schedule, saved.options, programs=saved.programs)
