"""Stages: passes as data, and the one runner for all of them.

Passes neither print, time nor check themselves: :func:`run_stages` does.
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any, get_type_hints

from torch.fx import GraphModule

from pabc import passes
from pabc.base.format import format_table
from pabc.options import Options

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A pass, when it runs, and what must hold after it.

    The signature of a pass determines its arguments: after the graph, each positional parameter
    gets the fact of its type, and each keyword-only parameter the option of its name. A pass
    returns the graph, or the graph and one new fact.

    Attributes:
        name: the stage's name, in `disable=` and in dumps.
        run: the pass.
        verify: the postcondition, which raises AssertionError; its arguments are found likewise.
        when: returns from the options whether the stage is needed; None: it always is.
        instead: replaces the pass if the stage is off, to provide the fact that later passes need.
        is_optional: True if results are correct without the stage, so that `disable=` may name it.
        changes_bits: True if results may differ from the model's by rounding.
        annotates: True if the pass writes to `node.meta` only, and leaves the code unchanged. With
            dynamic shapes, such a pass sees the sizes of the captured call.
    """

    name: str
    run: Callable[..., Any]
    verify: Callable[..., None] | None = None
    when: Callable[[Options], bool] | None = None
    instead: Callable[..., Any] | None = None
    is_optional: bool = False
    changes_bits: bool = False
    annotates: bool = False

    def is_on(self, options: Options) -> bool:
        """Returns True if the stage runs under these options."""
        is_needed = self.when is None or self.when(options)
        return is_needed and not (self.is_optional and self.name in options.disable)


@dataclass(frozen=True, slots=True)
class StageRecord:
    """The record of one stage that the runner ran.

    Attributes:
        stage: the stage.
        is_on: False if the stage was off.
        seconds: the seconds that the pass, its checks and this record took.
        num_nodes: the number of nodes of the graph before and after it.
        code: the graph's code after it; empty if code is not kept.
    """

    stage: Stage
    is_on: bool
    seconds: float
    num_nodes: tuple[int, int]
    code: str = ""

    @property
    def name(self) -> str:
        """The stage's name."""
        return self.stage.name


@dataclass(frozen=True, slots=True)
class Compilation:
    """A graph on its way through the stages.

    Attributes:
        graph: the graph.
        facts: the facts that passes found so far.
        records: the records of the stages so far.
    """

    graph: GraphModule
    facts: passes.Facts
    records: tuple[StageRecord, ...] = ()


def run_stages(
    stages: Sequence[Stage],
    compilation: Compilation,
    options: Options,
    *,
    keeps_code: bool = False,
) -> Compilation:
    """Runs stages one after the other.

    After each stage, the postcondition is checked, the graph is linted and, if it was changed in
    place, recompiled; seconds and ops are logged and recorded.

    Args:
        stages: the stages, in order.
        compilation: the graph, and the facts that the first stages take.
        options: the user's options.
        keeps_code: True to record the graph's code after each stage.
    """
    for stage in stages:
        compilation = _run_stage(stage, compilation, options, keeps_code)
    return compilation


def _run_stage(
    stage: Stage, before: Compilation, options: Options, keeps_code: bool
) -> Compilation:
    start = perf_counter()
    num_before, ops_before = len(before.graph.graph.nodes), _count_ops(before.graph)
    is_on = stage.is_on(options)
    graph, facts = before.graph, before.facts
    run = stage.run if is_on else stage.instead
    if run is not None:
        with _hints(before) if stage.annotates else nullcontext():
            graph, facts = _apply(run, graph, facts, options)
            if is_on and stage.verify is not None:
                arguments, _ = _arguments(stage.verify, facts, options)
                stage.verify(graph, *arguments)
        graph.graph.lint()
        # A new GraphModule has compiled its code when it was made.
        if graph is before.graph and not stage.annotates:
            graph.recompile()
    record = StageRecord(
        stage,
        is_on,
        perf_counter() - start,
        (num_before, len(graph.graph.nodes)),
        graph.code if keeps_code else "",
    )
    if is_on:
        _log(record, ops_before, _count_ops(graph))
    return Compilation(graph, facts, (*before.records, record))


def _hints(compilation: Compilation) -> AbstractContextManager[None]:
    """Gives symbolic sizes of the graph their values in the captured call, within the context."""
    captured = compilation.facts.get(passes.Captured)
    return passes.hinted(compilation.graph, captured.sizes if captured is not None else None)


def _apply(
    run: Callable[..., Any], graph: GraphModule, facts: passes.Facts, options: Options
) -> tuple[GraphModule, passes.Facts]:
    arguments, keywords = _arguments(run, facts, options)
    found = run(graph, *arguments, **keywords)
    if isinstance(found, tuple):
        graph, fact = found
        return graph, facts.adding(fact)
    return found, facts


def _arguments(
    run: Callable[..., Any], facts: passes.Facts, options: Options
) -> tuple[list[Any], dict[str, Any]]:
    """Returns the positional and keyword arguments of a pass, from facts and options."""
    kinds, names = _parameters(run)
    return [facts[kind] for kind in kinds], {
        name: getattr(options, name) for name in names if hasattr(options, name)
    }


@cache
def _parameters(run: Callable[..., Any]) -> tuple[tuple[type, ...], tuple[str, ...]]:
    """Returns the types of a pass's positional parameters after the graph, and its keywords."""
    hints = get_type_hints(run)
    _, *parameters = inspect.signature(run).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    return tuple(hints[name] for name in positional), tuple(keywords)


def _count_ops(gm: GraphModule) -> Counter[str]:
    """Returns the number of calls of each op; empty if debug logging is off."""
    if not logger.isEnabledFor(logging.DEBUG):
        return Counter()
    return Counter(str(node.target) for node in gm.graph.nodes if node.op.startswith("call"))


def _log(record: StageRecord, before: Counter[str], after: Counter[str]) -> None:
    changes = {op: after[op] - before[op] for op in sorted({*before, *after})}
    ops = ", ".join(f"{num:+d} {op}" for op, num in changes.items() if num)
    old, new = record.num_nodes
    logger.debug("%s: %.3f s, %d -> %d nodes; %s", record.name, record.seconds, old, new, ops)


def format_records(records: Sequence[StageRecord]) -> list[str]:
    """Returns a table of stages: nodes, seconds, and whether they may change bits."""
    header = ("stage", "nodes", "seconds", "bits", "")
    return format_table(header, [_format_record(record) for record in records])


def _format_record(record: StageRecord) -> tuple[str, ...]:
    stage, (before, after) = record.stage, record.num_nodes
    bits = "may change" if stage.changes_bits else "same"
    optional = "disable= leaves it out" if stage.is_optional else ""
    if not record.is_on:
        return (stage.name, "off", "", bits, optional)
    return (stage.name, f"{before} -> {after}", f"{record.seconds:.3f}", bits, optional)
