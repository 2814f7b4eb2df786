"""emit: compiles blocks with Inductor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import copy_context
from importlib import import_module
from threading import Thread
from typing import Any

import torch
from torch.fx import GraphModule

from pabc.internals.onednn import lowering_onednn

from .code import BlockFunction, CompiledBlock, Listing
from .ir import is_collective, is_effect, output_node, user_inputs
from .tracing.lean import without_garbage_collection


def compile_blocks(blocks: Iterable[GraphModule]) -> list[CompiledBlock]:
    """Compiles blocks (:func:`split_blocks_pass`) with Inductor, one after the other.

    Dynamo takes no part, so that a call evaluates no guards and never recompiles: weights are
    inputs, and the caller checks shapes once per call. C++ compilers work on one block while
    Inductor lowers the next.
    """
    pending = _PendingCompilers()
    made: list[tuple[BlockFunction, Any]] = []
    with without_garbage_collection():
        for block in blocks:
            with pending.put_off() if _is_on_cpu(block) else nullcontext():
                has_effects = any(map(is_effect, block.graph.nodes))  # Inductor would drop these
                made.append((_run_block(block), None) if has_effects else _compile_block(block))
        pending.end()
    return [CompiledBlock(run, None if inner is None else Listing.of(inner)) for run, inner in made]


def run_blocks(blocks: Iterable[GraphModule]) -> list[CompiledBlock]:
    """Returns functions that run blocks op by op, without compiling them."""
    return [CompiledBlock(_run_block(block)) for block in blocks]


def _run_block(gm: GraphModule) -> BlockFunction:
    def run(inputs: list[Any]) -> Sequence[torch.Tensor]:
        given = [*inputs]
        inputs.clear()
        return list(gm(*given))

    return run


def _compile_block(gm: GraphModule) -> tuple[BlockFunction, Any]:
    """Returns the code of a block, and Inductor's own result where that alone is the code.

    AOTAutograd wraps that result in what gradients, and inputs that share memory, need. A block on
    the CPU with as many inputs and results as Inductor's graph has needs none of it.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    found: list[Any] = []
    widths = [_widths(gm)]

    def compile_inner(graph: GraphModule, *args: Any, **kwargs: Any) -> Any:
        widths.append(_widths(graph))
        found.append(compile_fx_inner(graph, *args, **kwargs))
        return found[-1]

    with torch.no_grad(), lowering_onednn(), _overlapping(gm), _fixing_threads():
        compiled: Any = compile_fx(gm, example_inputs(gm), inner_compile=compile_inner)
    if len(found) == 1 and widths[0] == widths[1] and _is_on_cpu(gm):
        (inner,) = found
        has_parts = "self.partitions[" in inner.source_code  # which are gone when `inner` is
        return (inner if has_parts else inner.current_callable), inner
    boxed = inspect.unwrap(compiled, stop=_takes_list)
    return (boxed if _takes_list(boxed) else lambda inputs: compiled(*inputs)), None


def _widths(gm: GraphModule) -> tuple[int, int]:
    """Returns the numbers of inputs and results."""
    return len(user_inputs(gm.graph)), len(output_node(gm.graph).args[0])


def _overlapping(gm: GraphModule) -> AbstractContextManager[object]:
    """Makes Inductor start collectives as early as possible, and wait for them as late as possible.

    By default it waits immediately, which takes the least memory. A setting of the user wins.
    """
    from torch._inductor import config

    if config.reorder_for_compute_comm_overlap or not any(map(is_collective, gm.graph.nodes)):
        return nullcontext()
    order = {"reorder_for_compute_comm_overlap_passes": ["sink_waits", "raise_comms"]}
    return config.patch({"reorder_for_compute_comm_overlap": True, **order})


def _fixing_threads() -> AbstractContextManager[object]:
    """Makes kernels on the CPU run on as many threads as there are now.

    By default, where that is the number of cores, they run on as many as there are at the call, but
    have room for the partial sums of as many as there are now: too little in a process that loads
    them on a larger machine. A setting of the user wins.
    """
    from torch._inductor import config

    if config.cpp.dynamic_threads or config.cpp.threads > 0:
        return nullcontext()
    return config.patch({"cpp.threads": torch.get_num_threads()})


def example_inputs(block: GraphModule) -> list[torch.Tensor | None]:
    """Returns uninitialized inputs with the layouts that a block expects."""
    return [
        torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=val.device)
        if isinstance(val := node.meta.get("val"), torch.Tensor)
        else None
        for node in user_inputs(block.graph)
    ]


def _is_on_cpu(block: GraphModule) -> bool:
    inputs = (node.meta.get("val") for node in user_inputs(block.graph))
    return all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))


class _PendingCompilers:
    """The C++ compilers, in processes of their own, that Inductor waits for after each graph."""

    def __init__(self) -> None:
        self._put_off: list[tuple[Any, dict[str, Any]]] = []

    @contextmanager
    def put_off(self) -> Iterator[None]:
        """Puts off the waits of Inductor within the context until :meth:`end`."""
        from torch._inductor.async_compile import AsyncCompile

        wait = AsyncCompile.wait
        AsyncCompile.wait = lambda *pending: self._put_off.append(pending)  # type: ignore[method-assign]
        try:
            yield
        finally:
            AsyncCompile.wait = wait  # type: ignore[method-assign]

    def end(self) -> None:
        """Waits for all compilers that were put off."""
        for compiler, scope in self._put_off:
            compiler.wait(scope)


def prepare_inductor() -> Callable[[], None]:
    """Starts to check in the background which vector instructions the C++ compiler supports.

    Inductor needs it once per process and caches the answer. It takes seconds, during which the
    model can be captured. Returns a function that waits for it.
    """
    import_module("torch._inductor.compile_fx")  # in one thread, as its modules import each other
    thread = Thread(target=_try_vector_instructions, name="pabc: instructions", daemon=True)
    thread.start()
    return thread.join


def _try_vector_instructions() -> None:
    """Makes Inductor choose its vector instructions, trying all sets in parallel.

    Inductor tries each set by compiling a program that includes all of PyTorch's vector code. If
    PyTorch's own kernels use the best set, it suffices that the compiler accepts the flags, which a
    tiny program tells.
    """
    from torch._inductor import config, cpu_vec_isa

    supported = cpu_vec_isa.x86_isa_checker()
    known = cpu_vec_isa.supported_vec_isa_list
    sets = [isa for isa in known if all(flag in supported for flag in str(isa).split())]
    used = torch.backends.cpu.get_cpu_capability().lower()
    with ThreadPoolExecutor(max(len(sets), 1)) as pool:
        is_enough = (
            config.cpp.vec_isa_ok is None
            and any(used in str(isa) for isa in sets[:1])
            and all(pool.map(lambda isa: isa.check_build(_TINY), sets))
        )
        with config.patch({"cpp.vec_isa_ok": True}) if is_enough else nullcontext():
            contexts = [copy_context() for _ in sets]  # carry the patch to the threads
            list(pool.map(lambda isa, context: context.run(bool, isa), sets, contexts))
            cpu_vec_isa.valid_vec_isa_list()  # cached by Inductor


_TINY = 'extern "C" int pabc_nothing() { return 0; }'


def _takes_list(function: Any) -> bool:
    """Returns True if a function takes its inputs in one list, so that it can free them.

    Functions that AOTAutograd makes do.
    """
    code = getattr(function, "__code__", None)
    takes_one = code is not None and code.co_argcount == 1 and not code.co_flags & _VARIADIC
    return takes_one and getattr(function, "_boxed_call", False)


_VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
