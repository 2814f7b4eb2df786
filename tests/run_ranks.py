"""Runs sharded generations on 2, 3 and 4 ranks, and writes what came of them.

    python tests/run_ranks.py FOLDER [CASE]...

One process captures each model and computes what one rank gives; ranks are forked from it, so that
neither is done again on each. Each rank compares each step and counts what it sends; rank 0 of P
writes FOLDER/ranks_P.json: case -> what each rank found. A case that raises ends the run; those
before it are in the report.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from stages import copy_graph
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

from sharded.cases import CASES, NUM_RANKS, RankCase
from sharded.counting import CountSent
from sharded.subjects import Subject, find_subject

import pabc
from pabc import passes
from pabc.plan import Plan

TIMEOUT = timedelta(seconds=300)
"""Time that a collective may take: another rank may still compile, on a machine with other work."""
Found = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One call: its output, the generation and step it was, the collectives and bytes it sent."""

    output: Tensor
    generation: int
    index: int
    sent: tuple[int, int]


def main(folder: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_captures()
    cases = [case for case in CASES if not names or case.name in names]
    references = References()
    for case in cases:
        if not case.follows_plans:
            references.find(case)
    for num_ranks in NUM_RANKS:
        chosen = [case for case in cases if num_ranks in case.ranks]
        if chosen:
            arguments = num_ranks, chosen, references, Path(folder)
            multiprocessing.start_processes(run_rank, arguments, num_ranks, start_method="fork")


def run_rank(
    rank: int, num_ranks: int, cases: list[RankCase], references: References, folder: Path
) -> None:
    """Runs the cases on one of the ranks."""
    store = f"file://{folder / f'store_{num_ranks}'}"
    dist.init_process_group("gloo", store, TIMEOUT, num_ranks, rank)
    found: dict[str, list[Found]] = {}
    for case in cases:
        if rank == 0:
            print(f"running {case.name} on {num_ranks} ranks", flush=True)
        start = time.perf_counter()
        mine = run_case(case, references)
        every: list[Any] = [None] * num_ranks
        dist.all_gather_object(every, {**mine, "seconds": time.perf_counter() - start})
        found[case.name] = every
        if rank == 0:
            (folder / f"ranks_{num_ranks}.json").write_text(json.dumps(found))
    dist.barrier()  # a rank that leaves closes its connections to the others
    dist.destroy_process_group()


def keep_captures() -> None:
    """One capture serves all cases of a model: it knows nothing of ranks."""
    capture = passes.capture
    kept: dict[Any, Any] = {}

    def capture_once(model: nn.Module, args: Any, kwargs: Any, **options: Any) -> Any:
        if options.get("outside"):
            return capture(model, args, kwargs, **options)
        leaves = pytree.tree_leaves((args, kwargs))
        key = model, *(x.shape if isinstance(x, Tensor) else x for x in leaves)
        if key not in kept:
            kept[key] = capture(model, args, kwargs, **options)
        gm, known = kept[key]
        return copy_graph(gm), known

    passes.capture = capture_once


def run_case(case: RankCase, references: References) -> Found:
    """What this rank found."""
    subject = find_subject(case.subject, case.batch)
    mesh = make_mesh(case)
    fast = pabc.compile(
        subject.model, case.schedules[0], backend=case.backend, mesh=mesh, **case.options
    )
    if case.backend == "inductor":  # compilers run ops of their own, which are not to be counted
        fast.prepare(**subject.call(0, 0))
    steps, plans = run_generations(case, fast, subject)
    communication = fast.explain().communication
    dims = [each.axis.dim for each in communication.sharded]
    expected, reused = references.find(case, plans)
    outputs = [step.output for step in steps]
    if case.options.get("output") == "sharded":
        pairs = zip(outputs, expected, strict=True)
        outputs = [join_shards(x, mesh, dims, y.shape) for x, y in pairs]
    each = [(communication.calls_at(plan), communication.bytes_at(plan)) for plan in plans]
    return {
        "errors": [find_error(*pair) for pair in zip(outputs, expected, strict=True)],
        "reused": reused,
        "sent": [step.sent for step in steps],
        "predicted": [[int(at[step.index]) for at in each[step.generation]] for step in steps],
        "plans": [plan.to_json() for plan in plans],
        "dims": dims,
        "imagined": imagine(case, subject) if dist.get_rank() == 0 and not case.options else "",
        "communication": str(communication),
    }


def make_mesh(case: RankCase) -> DeviceMesh:
    num_ranks = dist.get_world_size()
    if case.batch_ranks is None:
        return init_device_mesh("cpu", (num_ranks,))
    sizes = case.batch_ranks, num_ranks // case.batch_ranks
    return init_device_mesh("cpu", sizes, mesh_dim_names=("batch", "tokens"))


def run_generations(
    case: RankCase, fast: pabc.CompiledModel, subject: Subject
) -> tuple[list[Step], list[Plan]]:
    """All calls, in order, and the plan of each generation."""
    steps, plans = [], []
    for generation, schedule in enumerate(case.schedules):
        fast.schedule = schedule
        for index in range(schedule.num_steps):
            for branch in range(case.branches):
                with name_branch(fast, case, branch), CountSent() as count, torch.no_grad():
                    output = first_output(fast(**subject.call(index, branch)))
                steps.append(Step(output, generation, index, (count.calls, count.nbytes)))
        plans.append(fast.plan)
    return steps, plans


def name_branch(fast: pabc.CompiledModel, case: RankCase, branch: int) -> Any:
    return nullcontext() if case.branches == 1 else fast.cache_context(f"branch {branch}")


def first_output(result: Any) -> Tensor:
    return pytree.tree_leaves(result if not hasattr(result, "to_tuple") else result.to_tuple())[0]


class References:
    """Keeps what one rank gives for each case: the outputs, and how many are not the model's own.

    Where nothing is reused, all are.
    """

    def __init__(self) -> None:
        self._known: dict[Any, tuple[list[Tensor], int]] = {}

    def find(self, case: RankCase, plans: Sequence[Plan] = ()) -> tuple[list[Tensor], int]:
        """Returns the outputs of all calls; `plans` are those of the ranks."""
        if case.reference not in self._known:
            self._known[case.reference] = _run_one_rank(case, plans)
        return self._known[case.reference]


def _run_one_rank(case: RankCase, plans: Sequence[Plan]) -> tuple[list[Tensor], int]:
    subject = find_subject(case.subject, case.batch)
    plain = [
        first_output(subject.model(**subject.call(index, branch)))
        for schedule in case.schedules
        for index in range(schedule.num_steps)
        for branch in range(case.branches)
    ]
    if not any(schedule.reuses for schedule in case.schedules):
        return plain, 0
    options = {name: case.options[name] for name in case.one_rank_options}
    if case.follows_plans:
        case = case.follow(plans)
    fast = pabc.compile(subject.model, case.schedules[0], backend="eager", **options)
    steps, _ = run_generations(case, fast, subject)
    outputs = [step.output for step in steps]
    return outputs, sum(not torch.equal(a, b) for a, b in zip(outputs, plain, strict=True))


def join_shards(x: Tensor, mesh: DeviceMesh, dims: list[int], sizes: torch.Size) -> Tensor:
    """All ranks' shards put together, padding cut: of tokens, then of samples."""
    for mesh_dim, dim in reversed(list(enumerate(dims))):
        parts = [torch.empty_like(x) for _ in range(mesh.size(mesh_dim))]
        dist.all_gather(parts, x.contiguous(), group=mesh.get_group(mesh_dim))
        joined = torch.cat(parts, dim)
        assert joined.shape[dim] >= sizes[dim] > joined.shape[dim] - x.shape[dim] * len(parts)
        x = joined.narrow(dim, 0, sizes[dim])
    return x


def find_error(x: Tensor, y: Tensor) -> float:
    assert x.shape == y.shape and x.dtype == y.dtype, (x.shape, y.shape)
    return float((x - y).abs().max().nan_to_num(float("inf")))


def imagine(case: RankCase, subject: Subject) -> str:
    """What is said of as many ranks that are not there."""
    num_ranks = dist.get_world_size()
    over = case.batch_ranks
    ranks = num_ranks if over is None else (over, num_ranks // over)
    call = subject.call(0, 0)
    found = pabc.explain(subject.model, ranks=ranks, schedule=case.schedules[0], **call)
    return str(found.communication)


if __name__ == "__main__":
    main(*sys.argv[1:])
