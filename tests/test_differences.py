"""Step-to-step differences against forward hooks on the same model."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel

from pabc.differences import Differences

STEPS = 4
SUFFIXES = {"attn1": "spatial", "attn2": "cross", "ff": "mlp"}


@pytest.fixture(scope="module")
def model() -> LatteTransformer3DModel:
    torch.manual_seed(0)
    latte = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        cross_attention_dim=16,
        attention_bias=True,
        sample_size=8,
        patch_size=4,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=8,
        video_length=3,
    )
    return latte.eval().requires_grad_(False)


def draw_steps(batch: int = 2) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, 5, 8, generator=generator)
    return [
        (torch.randn(batch, 1, 3, 8, 8, generator=generator), torch.full((batch,), t), text)
        for t in range(999, 999 - STEPS, -1)
    ]


class HookReference:
    """Collects what the hooked modules return, by kind, in the model's order."""

    def __init__(self, model: nn.Module) -> None:
        self.outputs: dict[str, list[torch.Tensor]] = defaultdict(list)
        self.handles = []
        for path, module in model.named_modules():
            kind = SUFFIXES.get(path.rpartition(".")[2])
            if kind is not None and path.count(".") == 2:
                kind = "temporal" if path.startswith("temporal") and kind == "spatial" else kind
                self.handles.append(module.register_forward_hook(self._keep(path, kind)))
        self.kinds: dict[str, str] = {}

    def _keep(self, path: str, kind: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            self.kinds[path] = kind  # in the order of execution
            self.outputs[path].append(output.clone())

        return hook

    def curves(self) -> dict[str, np.ndarray]:
        rows: dict[str, list[list[float]]] = defaultdict(list)
        for path, kind in self.kinds.items():
            seen = self.outputs[path]
            pairs = zip(seen[1:], seen[:-1], strict=True)
            rows[kind].append([float((a - b).square().mean()) for a, b in pairs])
        return {kind: np.array(values) for kind, values in rows.items()}


def test_curves_equal_those_of_hooks(model: LatteTransformer3DModel) -> None:
    reference = HookReference(model)
    expected_outputs = [model(*inputs).sample for inputs in draw_steps()]
    for handle in reference.handles:
        handle.remove()
    differences = Differences(model)
    for inputs, expected in zip(draw_steps(), expected_outputs, strict=True):
        assert torch.equal(differences(*inputs).sample, expected)
    curves, wanted = differences.curves(), reference.curves()
    assert curves.keys() == wanted.keys() == {"spatial", "cross", "temporal", "mlp"}
    for kind, expected in wanted.items():
        assert curves[kind].shape == (4 if kind == "mlp" else 2, STEPS - 1)
        np.testing.assert_allclose(curves[kind], expected, rtol=1e-5)


def test_reset_starts_a_new_measurement(model: LatteTransformer3DModel) -> None:
    differences = Differences(model)
    steps = draw_steps()
    with pytest.raises(RuntimeError, match="expected two steps or more, found 0"):
        differences.curves()
    for inputs in steps[:2]:
        differences(*inputs, return_dict=False)
    first = differences.curves()["spatial"]
    differences.reset()
    for inputs in steps[:3]:
        differences(*inputs, return_dict=False)
    second = differences.curves()["spatial"]
    assert second.shape == (2, 2)
    np.testing.assert_array_equal(second[:, :1], first)


def test_another_shape_in_mid_generation_is_refused(model: LatteTransformer3DModel) -> None:
    differences = Differences(model)
    differences(*draw_steps()[0])
    with pytest.raises(
        ValueError, match="expected inputs with the shapes, dtypes and constants of"
    ):
        differences(*draw_steps(batch=1)[0])


def test_training_mode_is_refused() -> None:
    with pytest.raises(RuntimeError, match="eval mode"):
        Differences(nn.Linear(2, 2))(torch.ones(1, 2))
