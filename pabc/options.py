"""The options of :func:`pabc.compile`, :func:`pabc.explain` and `pabc explain`, checked.

Every way in builds the same :class:`Options`, so that one option is checked in one place, with one
form of error: `name: expected ..., found ...`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal, get_args

from torch.distributed.device_mesh import DeviceMesh

from pabc import passes
from pabc.schedule import Schedule
from pabc.sharding import shard_for, shard_over, shares_computed
from pabc.validate import as_bytes, check_choice

Backend = Literal["inductor", "eager", "oracle", "original"]
Offload = Literal["cpu"]
DisabledStage = Literal[
    "hoist", "repeats", "nest", "encode", "offload", "formulas", "onednn", "lower", "blocks"
]
"""The stages that results do not depend on, but for rounding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The options of a compiled model, besides its schedule.

    :meth:`of` takes options as users spell them; the constructor takes the fields as they are.

    Raises: ValueError for a value, or a combination, that is not allowed.
    """

    backend: Backend = "inductor"
    """The backend that runs a phase: code of Inductor; `"eager"`, its graph, op by op; `"oracle"`,
    the guarded graph, unspecialized, which every other backend is compared with; `"original"`, no
    graph: the model itself is called, and only whole calls can be reused."""

    cut: passes.Cut = "attention"
    """The value of a region that is kept: the last one before the timestep's gate, or, for
    `"branch"`, the one that is added to the residual stream."""

    kinds: Mapping[str, str] = field(default_factory=dict)
    """Patterns (fnmatch) of qualified module names -> the kind of the attentions in them, in place
    of the one that the axes tell."""

    latents: str | None = None
    """The name of the denoised input; None: the first input that comes out again."""

    dynamic: bool = False
    """Captures dynamic shapes: one capture serves all sizes of the inputs for which the model does
    the same. Not with `sharding`."""

    cache_dtype: passes.CacheDtype = "keep"
    """The form in which slots hold floating-point values: their own dtype, bfloat16, or e4m3 with a
    float32 scale per token."""

    offload: Offload | None = None
    """The place of slots between steps: `"cpu"`, in pinned host memory; None, on the model's
    device."""

    memory_budget: int | None = None
    """Bytes, 1 or more, that the slots of one branch may take at the fullest step; None: no
    limit."""

    cudagraphs: bool = False
    """Records each phase as a CUDA graph once it has run twice. Not with `offload`, nor with the
    oracle backend."""

    kernels: passes.Kernels = "auto"
    """The ops that Triton kernels replace: those for which a measured table says that kernels are
    faster; `"off"`, none; `"force"`, all that a kernel computes."""

    sharding: passes.Sharding | None = None
    """The sharding of the model over processes; None: it is not sharded."""

    disable: tuple[DisabledStage, ...] = ()
    """Names of stages to leave out, so that a fault can be bisected; results do not depend on them,
    but for rounding (:mod:`pabc.pipeline`)."""

    check_finite: bool = False
    """Raises :class:`pabc.GuardError` for a NaN or infinity among the values to be kept."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name in self.disable:
            check_choice("disable", name, get_args(DisabledStage))
        if not isinstance(self.cudagraphs, bool):
            raise ValueError(f"cudagraphs: expected True or False, found {self.cudagraphs!r}")
        for name, reason, is_in_conflict in self._conflicts():
            if is_in_conflict:
                raise ValueError(f"{name}: expected False with {reason}, found True")
        if self.backend == "original":
            self._check_needs_no_graph()

    def _check_needs_no_graph(self) -> None:
        """Raises ValueError for an option of graphs, where there are none."""
        if self.sharding is not None:
            raise ValueError(
                "mesh: expected None with backend='original', which captures no graph that could "
                "be sharded, found a mesh"
            )
        for name, default in self._of_graphs().items():
            found = getattr(self, name)
            if found != default:
                raise ValueError(
                    f"{name}: expected {default!r} with backend='original', which captures no "
                    f"graph, found {found!r}"
                )

    def _of_graphs(self) -> dict[str, object]:
        """Returns the defaults of the options that say how a graph is captured or compiled."""
        names = ("cut", "kinds", "latents", "dynamic", "cudagraphs", "kernels", "disable")
        found = {f.name: f for f in fields(self)}
        return {
            name: {} if name == "kinds" else found[name].default  # the only one with a factory
            for name in names
        }

    def without_capture(self) -> Options | None:
        """Returns the options with which the model is called as it is, those of graphs left out;
        None for a model that is to be sharded."""
        if self.sharding is not None:
            return None
        changes: dict[str, Any] = {**self._of_graphs(), "backend": "original"}
        return replace(self, **changes)

    def _conflicts(self) -> Iterable[tuple[str, str, bool]]:
        """Returns flags with an option that rules them out, and whether both are given."""
        moves = f"offload={self.offload!r}, whose values move"
        return (
            ("dynamic", "a mesh", self.dynamic and self.sharding is not None),
            ("cudagraphs", moves, self.cudagraphs and self.offload is not None),
            ("cudagraphs", "backend='oracle'", self.cudagraphs and self.backend == "oracle"),
        )

    @classmethod
    def of(
        cls,
        *,
        kinds: Mapping[str, str] | None = None,
        memory_budget: int | str | None = None,
        disable: Sequence[DisabledStage] = (),
        mesh: DeviceMesh | None = None,
        ranks: int | tuple[int, ...] | None = None,
        shard: int | None = None,
        output: passes.Output = "full",
        schedule: Schedule | None = None,
        **fields: Any,
    ) -> Options:
        """Returns the options that a user stated; `fields` are those spelled as they are kept.

        Args:
            kinds: see :attr:`kinds`; None: none are stated.
            memory_budget: a number of bytes, or text with a unit, such as "2GiB".
            disable: see :attr:`disable`.
            mesh: the processes that share the model.
            ranks: in place of a mesh, how many processes would share it, or the two sizes of a
                mesh; none of them need exist.
            shard: with a mesh or ranks, the dimension of the latents that is sharded.
            output: with a mesh, whether each rank gets `"full"` outputs, or its part, `"sharded"`.
            schedule: with ranks, what decides how often each region is computed.

        Raises: ValueError for a value, or a combination, that is not allowed.
        """
        check_choice("output", output, get_args(passes.Output))
        if ranks is not None:
            weigh = None if schedule is None else partial(shares_computed, schedule)
            sizes = _as_mesh_sizes(ranks)
            sharding: passes.Sharding | None = shard_for(sizes, dim=shard, weigh=weigh)
        elif mesh is not None:
            sharding = shard_over(mesh, dim=shard, output=output)
        else:
            _check_is_default("shard", shard, None)
            _check_is_default("output", output, "full")
            sharding = None
        budget = None if memory_budget is None else as_bytes(memory_budget, "memory_budget")
        if isinstance(disable, str):
            raise ValueError(f"disable: expected a sequence of names of stages, found {disable!r}")
        return cls(
            kinds=dict(kinds or {}),
            memory_budget=budget,
            disable=tuple(disable),
            sharding=sharding,
            **fields,
        )


_CHOICES: Mapping[str, tuple[object, ...]] = {
    "backend": get_args(Backend),
    "cut": get_args(passes.Cut),
    "cache_dtype": get_args(passes.CacheDtype),
    "offload": (None, *get_args(Offload)),
    "kernels": get_args(passes.Kernels),
}
"""Option -> its allowed values."""


def _as_mesh_sizes(ranks: int | tuple[int, ...]) -> tuple[int, ...]:
    """Returns the sizes of a mesh of one or two dimensions."""
    sizes = ranks if isinstance(ranks, tuple) else (ranks,)
    if len(sizes) not in (1, 2) or not all(isinstance(n, int) and n >= 1 for n in sizes):
        raise ValueError(f"ranks: expected a number of 1 or more, or two of them, found {ranks!r}")
    return sizes


def _check_is_default(name: str, value: object, default: object) -> None:
    if value != default:
        raise ValueError(f"{name}: expected {default!r} without a mesh, found {value!r}")
