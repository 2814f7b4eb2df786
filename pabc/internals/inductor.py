"""inductor: compiles graphs to kernels (`torch._inductor`). To import it takes seconds.

- `compile_fx`, `compile_fx_inner`: compile a graph, without Dynamo; the latter returns an object
  with `current_callable`, `source_code` and `constants`. Since 2.6.
- `takes_list` (`_boxed_call`): tells functions of AOTAutograd, which free their inputs. Since 2.6.
- `starting_collectives_early`: two passes of Inductor over collectives. Since 2.6.
- `fixing_threads`: kernels on the CPU run on as many threads as there are. Since 2.6.
- `putting_off_waits`: the C++ compilers of several graphs run at once. Since 2.6.
- `vector_sets`, `choose_vector_set`, `trusting_vector_sets`: which vector instructions the C++
  compiler supports, found in several threads. Since 2.6.
- `fresh_cache`: an empty folder of compiled code. Since 2.8.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .release import expecting

with expecting("Inductor"):
    from torch._inductor import comms, config, cpu_vec_isa
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.output_code import CompiledFxGraph
    from torch._inductor.utils import fresh_cache

    for _name in ("current_callable", "source_code", "constants"):
        if _name not in CompiledFxGraph.__dataclass_fields__:
            raise AttributeError(f"CompiledFxGraph has no {_name}")
    config.cpp.threads, config.cpp.dynamic_threads  # noqa: B018
    config.reorder_for_compute_comm_overlap, config.cpp.vec_isa_ok  # noqa: B018
    config.reorder_for_compute_comm_overlap_passes  # noqa: B018
    comms.sink_waits, comms.raise_comms, AsyncCompile.wait  # noqa: B018
    choose_vector_set: Callable[[], object] = cpu_vec_isa.valid_vec_isa_list
    cpu_vec_isa.x86_isa_checker, cpu_vec_isa.VecISA.check_build  # noqa: B018
    cpu_vec_isa.supported_vec_isa_list  # noqa: B018

__all__ = [
    "choose_vector_set",
    "compile_fx",
    "compile_fx_inner",
    "fixing_threads",
    "fresh_cache",
    "putting_off_waits",
    "starting_collectives_early",
    "takes_list",
    "trusting_vector_sets",
    "vector_sets",
]

_VARIADIC = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS


def takes_list(function: Any) -> bool:
    """Returns True if a function takes its inputs in one list, so that it can free them.

    Functions that AOTAutograd makes do.
    """
    code = getattr(function, "__code__", None)
    takes_one = code is not None and code.co_argcount == 1 and not code.co_flags & _VARIADIC
    return takes_one and getattr(function, "_boxed_call", False)


def starting_collectives_early() -> AbstractContextManager[object]:
    """Makes Inductor start collectives as early as possible, and wait for them as late as possible.

    By default it waits immediately, which takes the least memory. A setting of the user wins.
    """
    if config.reorder_for_compute_comm_overlap:
        return nullcontext()
    order = {"reorder_for_compute_comm_overlap_passes": ["sink_waits", "raise_comms"]}
    return config.patch({"reorder_for_compute_comm_overlap": True, **order})


def fixing_threads() -> AbstractContextManager[object]:
    """Makes kernels on the CPU run on as many threads as there are now.

    By default, where that is the number of cores, they run on as many as there are at the call, but
    have room for the partial sums of as many as there are now: too little in a process that loads
    them on a larger machine. A setting of the user wins.
    """
    if config.cpp.dynamic_threads or config.cpp.threads > 0:
        return nullcontext()
    return config.patch({"cpp.threads": torch.get_num_threads()})


@contextmanager
def putting_off_waits(put_off: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """Makes Inductor call `put_off` where it would wait for its C++ compilers.

    `put_off` gets what waits, and the names that it fills in; `AsyncCompile.wait` does so later.
    """
    wait = AsyncCompile.wait
    AsyncCompile.wait = lambda *pending: put_off(*pending)  # type: ignore[method-assign]
    try:
        yield
    finally:
        AsyncCompile.wait = wait  # type: ignore[method-assign]


def vector_sets() -> list[Any]:
    """Returns the sets of vector instructions of this CPU that Inductor has code for, the best
    first; each tries whether the C++ compiler supports it when it is converted to a bool."""
    supported = cpu_vec_isa.x86_isa_checker()
    known = cpu_vec_isa.supported_vec_isa_list
    return [isa for isa in known if all(flag in supported for flag in str(isa).split())]


def trusting_vector_sets() -> AbstractContextManager[object] | None:
    """Returns a context in which sets count as supported untried; None if the user has said which
    do."""
    return config.patch({"cpp.vec_isa_ok": True}) if config.cpp.vec_isa_ok is None else None
