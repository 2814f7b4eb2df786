"""What a row of the matrix is: a pipeline of diffusers, small, and how users call the real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

NUM_STEPS = 6
Cell = str
"""`yes`, `no: REASON`, `in part: REASON`, `untried`, or a value."""


@dataclass(frozen=True)
class Recipe:
    """How users call the pipeline with published weights, as Python code.

    Attributes:
        model: the model's name on the Hugging Face hub.
        call: what is given to the pipeline, without the parentheses.
        result: what is taken of what it returns.
        before: lines before the pipeline is made: parts, images.
        parts: arguments of `from_pretrained` besides the model and the dtype.
        dtype: the dtype that the model is published for.
    """

    model: str
    call: str
    result: str = ".images[0]"
    before: tuple[str, ...] = ()
    parts: str = ""
    dtype: str = "bfloat16"

    def code(self, pipeline: str) -> str:
        """Returns the lines to paste, for a class of diffusers, as ruff formats them."""
        dtype = f"torch_dtype=torch.{self.dtype}"
        load = [f'"{self.model}"', *filter(None, self.parts.split(", ")), dtype]
        return "\n".join(
            [
                *self.before,
                _write_call(f"pipe = diffusers.{pipeline}.from_pretrained", load),
                'pipe.to("cuda")',
                "fast_pipe = pabc.compile_pipeline(pipe, pabc.auto(speedup=2))",
                _write_call(f"{RESULTS[self.result]} = fast_pipe", self.call.split(", "))
                + self.result,
            ]
        )


def _write_call(function: str, arguments: Sequence[str]) -> str:
    """Returns a call in one line, or with a line for each argument."""
    line = f"{function}({', '.join(arguments)})"
    if len(line) <= 88:
        return line
    return "\n".join([f"{function}(", *(f"    {argument}," for argument in arguments), ")"])


RESULTS = {
    ".images[0]": "image",
    ".frames[0]": "video",
    ".audios[0]": "audio",
    "": "video, audio",
}
"""What is taken of a result -> the name that it is given."""


@dataclass(frozen=True)
class Row:
    """A pipeline with small random parts, and a call of it.

    Attributes:
        name: as in the table.
        pipeline: the class of diffusers.
        make: makes the pipeline; each time with the same weights.
        call: size -> arguments but for the steps, the noise and the type of the output; sizes 0 and
            1 differ.
        recipe: the same with published weights.
        untried: columns that are not tried.
    """

    name: str
    pipeline: str
    make: Callable[[], Any]
    call: Callable[[int], dict[str, Any]]
    recipe: Recipe
    untried: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def run(self, pipe: Any, *, seed: int = 0, num_steps: int = NUM_STEPS, size: int = 0) -> Tensor:
        """Returns the latents of a generation, of all modalities, as one vector."""
        result = pipe(
            num_inference_steps=num_steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            return_dict=False,
            **self.call(size),
        )
        leaves = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        return torch.cat([x.flatten().float() for x in leaves])


def small(model: type[nn.Module], **config: Any) -> Any:
    """Returns a model in eval mode whose weights are random, the same each time, and none zero."""
    torch.manual_seed(0)
    made = model(**config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.1)
    return made


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Returns the transformers of a pipeline, by name."""
    parts = {name: part for name, part in pipe.components.items() if "transformer" in name}
    return {name: part for name, part in parts.items() if part is not None}


def height(size: int) -> int:
    """Returns the pixels of a size; 8 make a latent."""
    return 48 + 16 * size
