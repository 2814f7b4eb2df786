"""Defines the sampling loops of `pareto.py`: a demo model, a sampler, calls, prompts and noise.

What is judged and what methods may choose their settings by have different prompts and noise.
Results that several methods need (full runs, fine solutions) are kept in a folder.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pareto_samplers import Sampler, make_sampler, name_fine
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pabc.demo import latte, models, sd3

OnCall = Callable[[int, float], AbstractContextManager[Any]]
"""Entered around each call, with its number and timestep."""


def no_context(index: int, timestep: float) -> AbstractContextManager[None]:
    """Returns a context that does nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Setup:
    """The setup of one table.

    Attributes:
        model: a demo model's name.
        sampler: one of `samplers.name_samplers`.
        calls: of the full run.
        guidance, shift: None: the model's own.
    """

    model: str
    sampler: str
    calls: int
    guidance: float | None = None
    shift: float | None = None

    def __str__(self) -> str:
        extra = [
            f", {name} {value:g}"
            for name, value in (("guidance", self.guidance), ("shift", self.shift))
            if value is not None
        ]
        return f"{self.model}, {self.sampler} {self.calls}{''.join(extra)}"


@dataclass(frozen=True)
class Clips:
    """Prompts and noise, of one or more seeds."""

    prompts: list[str]
    noise: Tensor

    def repeat(self, times: int) -> Clips:
        """Returns all clips, one after the other, so many times."""
        return Clips(self.prompts * times, self.noise.repeat(times, *[1] * (self.noise.dim() - 1)))


class Recorded(NamedTuple):
    """A full run: the latents (B, ...) that each call is given, its output (2 B, ...), and the
    samples."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    samples: Tensor


@dataclass(frozen=True)
class Loop:
    """A sampling loop over clips."""

    model: Any
    sampler: Sampler
    clips: Clips
    guidance: float | None = None

    @property
    def num_calls(self) -> int:
        """The calls of the full run."""
        return len(self.sampler.timesteps)

    def repeat(self, times: int) -> Loop:
        """Returns the loop with its clips repeated as a whole."""
        return replace(self, clips=self.clips.repeat(times))

    def run(self, call: Callable[..., Any], on_call: OnCall = no_context) -> Tensor:
        """Runs the loop with `call` in place of the model; returns samples in [-1, 1]."""
        whens = enumerate(self.sampler.timesteps)

        def step(*args: Any, **kwargs: Any) -> Any:
            with on_call(*next(whens)):
                return call(*args, **kwargs)

        return self.model.generate(
            step,
            self.clips.prompts,
            self.clips.noise,
            scheduler=copy.deepcopy(self.sampler.scheduler),
            num_steps=self.sampler.num_steps,
            guidance=self.guidance,
        )

    def record(self) -> Recorded:
        """Returns what the full run is given and gives."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def call(**kwargs: Any) -> Any:
            found = self.model.transformer(**kwargs)
            inputs.append(kwargs["hidden_states"].chunk(2)[0].clone())
            outputs.append(found[0])
            return found

        samples = self.run(call)
        return Recorded(inputs, outputs, samples)


class Operations(TorchFunctionMode):
    """Counts the multiplications of linear layers, convolutions and attention while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the function, and adds its multiplications."""
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "linear":
            self.total += args[0].numel() * args[1].shape[0]
        elif name in ("conv2d", "conv3d"):
            self.total += found.numel() * args[1][0].numel()
        elif name == "scaled_dot_product_attention":
            query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
            self.total += 2 * query.numel() * key.shape[-2]
        return found


@dataclass
class Store:
    """Keeps tensors in a folder, by what they were made from."""

    folder: Path

    def get(self, key: object, make: Callable[[], Any]) -> Any:
        """Returns what is stored under the key, or what `make` returns, and stores that."""
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.pt"
        if path.exists():
            return torch.load(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        value = make()
        part = path.with_suffix(".part")
        torch.save(value, part)
        part.replace(path)
        return value


@dataclass
class Subject:
    """A model with the clips that are judged and those that methods may see.

    Attributes:
        judged: of several seeds.
        seen: for the choice of settings; never judged.
        fine_calls: of the solution that counts as exact.
    """

    model: Any
    judged: Clips
    seen: Clips
    store: Store
    fine_calls: int
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        weights = [p.double().sum() for p in self.model.transformer.parameters()]
        self.digest = f"{self.model.name} {float(torch.stack(weights).abs().sum()):.10e}"

    def loop(self, setup: Setup, clips: Clips) -> Loop:
        """Returns the loop of a setup over clips."""
        sampler = make_sampler(self.model.scheduler, setup.sampler, setup.calls, setup.shift)
        return Loop(self.model, sampler, clips, setup.guidance)

    def full(self, setup: Setup) -> Tensor:
        """Returns the judged clips of the full run."""
        key = (self._key(self.judged), setup, "full")
        return self.store.get(
            key, lambda: self.loop(setup, self.judged).run(self.model.transformer)
        )

    def fine(self, setup: Setup) -> Tensor:
        """Returns the judged clips of the fine solution."""
        name = name_fine(self.model.scheduler, setup.sampler)
        return self.full(replace(setup, sampler=name, calls=self.fine_calls))

    def recorded(self, setup: Setup) -> Recorded:
        """Returns the full run of the clips that methods see."""
        key = (self._key(self.seen), setup, "recorded")
        return Recorded(*self.store.get(key, lambda: tuple(self.loop(setup, self.seen).record())))

    def draw_seen(self, seed: int) -> Clips:
        """Returns as many clips as methods see, of another seed; none has a judged prompt."""
        count = len(self.seen.prompts)
        return draw_others(self.model, self.judged.prompts, 100 + seed, count)

    def keep(self, setup: Setup, key: object, make: Callable[[], Any]) -> Any:
        """Returns what `make` finds out about a setup from the seen clips, from the store if it
        is there."""
        return self.store.get((self._key(self.seen), setup, key), make)

    def _key(self, clips: Clips) -> object:
        return self.digest, clips.prompts, float(clips.noise.double().square().sum())


def load_subject(
    name: str,
    judged: tuple[int, int],
    num_seen: int,
    store: Path,
    fine_calls: int,
    *,
    is_trained: bool = True,
    weights: Path | None = None,
) -> Subject:
    """Loads a demo model; draws clips, judged ones of several seeds.

    Args:
        name: of the model.
        judged: (seeds, clips of each).
        num_seen: clips that methods may see.
        store: the folder of what is kept.
        fine_calls: of the solution that counts as exact.
        is_trained: False: random weights, to see that everything runs.
        weights: the folder of the trained model; None: the one in the package.
    """
    model = models.load(name, weights) if is_trained else build_random(name)
    seeds, count = judged
    parts = [(model.prompts(seed, count), model.noise(seed, count)) for seed in range(1, seeds + 1)]
    prompts = [prompt for some, _ in parts for prompt in some]
    return Subject(
        model,
        Clips(prompts, torch.cat([noise for _, noise in parts])),
        draw_others(model, prompts, 100, num_seen),
        Store(store),
        fine_calls,
    )


def draw_others(model: Any, prompts: list[str], seed: int, count: int) -> Clips:
    """Returns clips of which none has one of these prompts."""
    drawn = model.prompts(seed, count + len(prompts))
    kept = [prompt for prompt in drawn if prompt not in prompts]
    return Clips(kept[:count], model.noise(seed, count))


def build_random(name: str) -> Any:
    """Returns a demo model with random weights."""
    torch.manual_seed(0)
    return {"digits": latte.build, "emoji": sd3.build}[name]().freeze("cpu")
