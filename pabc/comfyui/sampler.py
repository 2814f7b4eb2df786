"""Describes how a sampler turns the outputs of a model into latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def describe(sampler: Any, guider: Any, model: Any) -> str:
    """Returns a text that is another one for another sampler, guidance, or kind of prediction."""
    function = getattr(sampler, "sampler_function", sampler)
    settings = getattr(sampler, "extra_options", {})
    kinds = [kind.__name__ for kind in type(model.model_sampling).__mro__[1:-1]]
    return " ".join(
        (
            getattr(function, "__qualname__", type(function).__qualname__),
            str(_plain(settings)),
            type(guider).__qualname__,
            str(_plain(vars(guider))),
            ",".join(kinds),
        )
    )


def _plain(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Returns the settings that are plain values, which print alike in each process."""
    return sorted((k, v) for k, v in settings.items() if isinstance(v, int | float | str | None))
