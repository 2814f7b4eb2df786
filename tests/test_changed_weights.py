"""Whole generations with weights that change: values, tensors, adapters, quantized layers."""

import pytest
import torch
from models import ONE_BLOCK
from torch import nn
from weights import Int8Linear, add_adapter, with_int8_tensor

import pabc

pytestmark = pytest.mark.runtime

STEPS = range(3)


def with_quantized_layers(quantized):
    model = ONE_BLOCK.model()
    attn, mlp = model.blocks[0].attn, model.blocks[1].mlp
    for owner in (attn, mlp):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear):
                owner._modules[name] = quantized(child)
    return model.eval()


def run_generation(fast, model):
    """One generation with nothing reused: equals the model, step for step."""
    with torch.no_grad():
        for step in STEPS:
            call = ONE_BLOCK.call(step)
            torch.testing.assert_close(fast(**call), model(**call), rtol=1e-5, atol=1e-5)


def compiled(model, backend="eager"):
    return pabc.compile(model, pabc.Schedule.none(STEPS), backend=backend)


def merge(model, sign):
    attn = model.blocks[0].attn
    with torch.no_grad():
        torch.manual_seed(3)
        for linear in (attn.to_q, attn.to_k):
            low, high = torch.randn(2, linear.in_features), torch.randn(linear.out_features, 2)
            linear.weight.add_(high @ low, alpha=0.1 * sign)


def test_no_recompile_where_only_values_change():
    model = ONE_BLOCK.model()
    fast = compiled(model, "inductor")
    run_generation(fast, model)
    seconds = fast.explain().compile_seconds
    torch._dynamo.utils.counters.clear()
    changes = [
        lambda: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
        lambda: fast.load_state_dict(
            {k: v * 1.1 for k, v in model.state_dict().items()}, assign=True
        ),
        lambda: merge(model, 1),
        lambda: merge(model, -1),
        lambda: model.head.weight.data.mul_(1.1),
    ]
    for change in changes:
        change()
        run_generation(fast, model)
    assert fast.explain().compile_seconds == seconds
    assert fast.stats.captures == fast.stats.compiles == 1
    assert not torch._dynamo.utils.counters["inductor"]


def test_values_that_change_within_a_generation_are_read_at_the_next_step():
    model = ONE_BLOCK.model()
    fast = compiled(model)
    with torch.no_grad():
        for step in STEPS:
            merge(model, step + 1)
            call = ONE_BLOCK.call(step)
            assert torch.equal(fast(**call), model(**call))
    assert fast.stats.captures == 1


def test_a_tensor_replaced_within_a_generation_is_read_at_the_next_step():
    model = ONE_BLOCK.model()
    mask = {"full": [False, True, True]}
    fast = pabc.compile(model, pabc.Schedule.from_masks(STEPS, mask), backend="eager")
    with torch.no_grad():
        assert torch.equal(fast(**ONE_BLOCK.call(0)), model(**ONE_BLOCK.call(0)))
        assert not torch.equal(fast(**ONE_BLOCK.call(1)), model(**ONE_BLOCK.call(1)))
        to_v = model.blocks[0].attn.to_v
        to_v.weight = nn.Parameter(to_v.weight * 2)
        # What was kept was computed with other weights: it is recomputed.
        assert torch.equal(fast(**ONE_BLOCK.call(2)), model(**ONE_BLOCK.call(2)))
    assert fast.stats.fallbacks == {"weights": 1}
    assert fast.stats.captures == 1


def test_an_adapter_added_within_a_generation_takes_effect_at_the_next_step():
    model = ONE_BLOCK.model()
    fast = compiled(model)
    with torch.no_grad():
        fast(**ONE_BLOCK.call(0))
        add_adapter(model)
        assert torch.equal(fast(**ONE_BLOCK.call(1)), model(**ONE_BLOCK.call(1)))
    assert fast.stats.captures == 2


def test_an_adapter_that_adds_modules_is_recaptured():
    model = ONE_BLOCK.model()
    fast = compiled(model)
    run_generation(fast, model)
    plain = model.blocks[0].attn.to_q
    add_adapter(model)
    run_generation(fast, model)
    assert fast.stats.captures == 2
    model.blocks[0].attn.to_q.scaling["default"] = 0.5
    run_generation(fast, model)
    assert fast.stats.captures == 3
    model.blocks[0].attn.to_q = plain
    run_generation(fast, model)


def test_another_dtype_of_the_weights_is_recaptured():
    model = ONE_BLOCK.model()
    fast = compiled(model)
    run_generation(fast, model)
    model.double()
    call = {k: v.double() if v.is_floating_point() else v for k, v in ONE_BLOCK.call().items()}
    with torch.no_grad():
        fast.reset()
        assert torch.equal(fast(**call), model(**call))
    model.float()
    fast.reset()
    run_generation(fast, model)


@pytest.mark.parametrize("quantized", [Int8Linear, with_int8_tensor])
def test_quantized_layers(quantized):
    model = with_quantized_layers(quantized)
    mask = {"full": [False, True, False], "mlp": [False, True, True]}
    schedule = pabc.Schedule.from_masks(STEPS, mask)
    fast = pabc.compile(model, schedule, backend="eager")
    run_generation(compiled(model), model)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(fast(**ONE_BLOCK.call(0)), model(**ONE_BLOCK.call(0)))
            for step in STEPS[1:]:
                assert not torch.equal(fast(**ONE_BLOCK.call(step)), model(**ONE_BLOCK.call(step)))
            to_q = model.blocks[0].attn.to_q  # other values, in place
            (to_q if quantized is Int8Linear else to_q.weight).scale.mul_(1.5)
    assert fast.stats.captures == 1
