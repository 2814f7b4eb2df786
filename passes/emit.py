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
    from pabc.internals.inductor import compile_fx, compile_fx_inner, fixing_threads, takes_list

    found: list[Any] = []
    widths = [_widths(gm)]

    def compile_inner(graph: GraphModule, *args: Any, **kwargs: Any) -> Any:
        widths.append(_widths(graph))
        found.append(compile_fx_inner(graph, *args, **kwargs))
        return found[-1]

    with torch.no_grad(), lowering_onednn(), _overlapping(gm), fixing_threads():
        compiled: Any = compile_fx(gm, example_inputs(gm), inner_compile=compile_inner)
    is_alone = len(found) == 1 and widths[0] == widths[1] and hasattr(found[0], "source_code")
    if is_alone and _is_on_cpu(gm):
        (inner,) = found
        has_parts = "self.partitions[" in inner.source_code  # which are gone when `inner` is
        return (inner if has_parts else inner.current_callable), inner
    boxed = inspect.unwrap(compiled, stop=takes_list)
    return (boxed if takes_list(boxed) else lambda inputs: compiled(*inputs)), None


def _widths(gm: GraphModule) -> tuple[int, int]:
    """Returns the numbers of inputs and results."""
    return len(user_inputs(gm.graph)), len(output_node(gm.graph).args[0])


def _overlapping(gm: GraphModule) -> AbstractContextManager[object]:
    """Makes what a graph computes overlap with its communication."""
    from pabc.internals.inductor import starting_collectives_early

    has_some = any(map(is_collective, gm.graph.nodes))
    return starting_collectives_early() if has_some else nullcontext()


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
        from pabc.internals.inductor import putting_off_waits

        with putting_off_waits(lambda *pending: self._put_off.append(pending)):
            yield

    def end(self) -> None:
        """Waits for all compilers that were put off."""
        for compiler, scope in self._put_off:
            compiler.wait(scope)


def prepare_inductor() -> Callable[[], None]:
    """Starts to check in the background which vector instructions the C++ compiler supports.

    Inductor needs it once per process and caches the answer. It takes seconds, during which the
    model can be captured. Returns a function that waits for it.
    """
    import_module("pabc.internals.inductor")  # in one thread, as its modules import each other
    thread = Thread(target=_try_vector_instructions, name="pabc: instructions", daemon=True)
    thread.start()
    return thread.join


def _try_vector_instructions() -> None:
    """Makes Inductor choose its vector instructions, trying all sets in parallel.

    Inductor tries each set by compiling a program that includes all of PyTorch's vector code. If
    PyTorch's own kernels use the best set, it suffices that the compiler accepts the flags, which a
    tiny program tells.
    """
    from pabc.internals.inductor import choose_vector_set, trusting_vector_sets, vector_sets

    sets, trusting = vector_sets(), trusting_vector_sets()
    used = torch.backends.cpu.get_cpu_capability().lower()
    with ThreadPoolExecutor(max(len(sets), 1)) as pool:
        is_enough = (
            trusting is not None
            and any(used in str(isa) for isa in sets[:1])
            and all(pool.map(lambda isa: isa.check_build(_TINY), sets))
        )
        with trusting if is_enough and trusting is not None else nullcontext():
            contexts = [copy_context() for _ in sets]  # carry the patch to the threads
            list(pool.map(lambda isa, context: context.run(bool, isa), sets, contexts))
            choose_vector_set()  # cached by Inductor


_TINY = 'extern "C" int pabc_nothing() { return 0; }'
