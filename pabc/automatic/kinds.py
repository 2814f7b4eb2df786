"""Tells of which kind the generations of some models are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from pabc.automatic.fingerprint import describe_family, describe_form, versions_of
from pabc.automatic.plans import Kind
from pabc.calibration.digests import describe_precision, describe_weights


class Kinds:
    """The kinds of the generations of one model, or of the models of one pipeline.

    What is known of the models is kept; not thread-safe.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._family = ""
        self._weights: tuple[int, str] = 0, ""

    def of(self, leaves: Sequence[Any], sampler: str, timesteps: Sequence[float]) -> Kind:
        """Returns what is known of a generation that begins with a call with these arguments."""
        if not self._weights[1] or self._weights[0] != versions_of(self._modules.values()):
            self._read_weights()
        if not self._family:
            self._family = describe_family(self._modules)
        form, precision = describe_form(leaves), describe_precision(leaves)
        weights, steps = self._weights[1], tuple(timesteps)
        return Kind(self._family, weights, form, sampler, steps, precision)

    def read_again(self, kind: Kind) -> Kind:
        """Returns a kind with the weights as they are: writes to `weight.data` change no version,
        so that they may not be those that were read last."""
        self._read_weights()
        return replace(kind, weights=self._weights[1])

    def _read_weights(self) -> None:
        versions = versions_of(self._modules.values())
        self._weights = versions, describe_weights(self._modules)
