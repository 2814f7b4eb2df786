"""Models that nobody prepared: kinds, and equality with caches made of module hooks."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

pytest.importorskip("diffusers")

from zoo import ENTRIES

import pabc

pytestmark = pytest.mark.zoo
NUM_STEPS = 7
RANGES = {"spatial": 2, "temporal": 3, "full": 2, "joint": 2, "cross": 3}
TOLERANCE = 1e-5
PROJECTIONS = {"to_q", "to_query", "to_qkv_mlp_proj", "q_proj"}
"""What tells an attention module from others whose name fits the pattern as well."""


def kind_of(entry, name):
    return next((k for pattern, k in entry.kinds.items() if fnmatchcase(name, pattern)), None)


def find_attention_modules(entry, model):
    """Modules by name pattern, as stated in the zoo: independent of what pabc finds."""
    return {
        name: module
        for name, module in model.named_modules()
        if kind_of(entry, name) is not None and PROJECTIONS & set(dict(module.named_children()))
    }


def generate(model, call):
    """All outputs of a generation in which every step's latents follow from the one before."""
    latents = call["hidden_states"]
    outputs = []
    with torch.no_grad():
        for _ in range(NUM_STEPS):
            out = model(**{**call, "hidden_states": latents})[0]
            if out.shape != latents.shape:
                out = out[:, : latents.shape[1]]
            latents = latents - 0.1 * out
            outputs.append(out)
    return torch.stack(outputs)


def generate_with_hooks(entry, model, call):
    """The same with each attention module's output kept for its range of steps."""
    kept, step = {}, [0]

    def wrap(module, every):
        forward = module.forward

        def cached(*args, **kwargs):
            if step[0] % every == 0:
                kept[module] = forward(*args, **kwargs)
            return kept[module]

        module.forward = cached

    def wrap_share(module, every):
        """Attention and MLP in one output projection: only the attention's features are kept."""
        project = module.to_out.forward

        def cached(features):
            share, rest = features.split([module.inner_dim, module.mlp_hidden_dim], dim=-1)
            if step[0] % every == 0:
                kept[module] = share
            return project(torch.cat([kept[module], rest], dim=-1))

        module.to_out.forward = cached

    modules = find_attention_modules(entry, model)
    for name, module in modules.items():
        if (kind := kind_of(entry, name)) in RANGES:
            shared = fnmatchcase(name, entry.shared)
            (wrap_share if shared else wrap)(module, RANGES[kind])
    original = model.forward

    def count(*args, **kwargs):
        result = original(*args, **kwargs)
        step[0] += 1
        return result

    outputs = generate(count, call)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return outputs


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_zoo(entry, add_row):
    model, call = entry.build()
    modules = find_attention_modules(entry, model)
    expected = {name: kind_of(entry, name) for name in modules}

    steps = range(NUM_STEPS)
    nothing = pabc.compile(model, pabc.Schedule.none(steps), backend="eager")
    unchanged = generate(nothing, call)
    plain = generate(model, call)
    assert torch.equal(unchanged, plain)
    found = nothing.explain()
    # Several attention calls of one module have one name, counted.
    assert {(n.partition("#")[0], k) for n, k in found.attention.items()} == {*expected.items()}
    assert not found.outside

    kinds = set(expected.values()) & set(RANGES)
    schedule = pabc.Schedule.pyramid(steps, **{kind: RANGES[kind] for kind in kinds})
    fast = pabc.compile(model, schedule, backend="eager")
    outputs = generate(fast, call)
    error = (outputs - generate_with_hooks(entry, model, call)).abs().max().item()
    assert error <= TOLERANCE
    assert not torch.equal(outputs, plain), "nothing was reused"
    oracle = pabc.compile(model, schedule, backend="oracle")
    assert torch.equal(outputs, generate(oracle, call))
    add_row(
        "zoo",
        model=entry.name,
        attentions=f"{len(found.attention)} / {len(expected)}",
        kinds=", ".join(sorted(set(expected.values()))),
        regions=len(found.regions),
        error=f"{error:.1e}",
    )
