"""Whole generations: against the model itself, the guarded oracle, and diffusers' own PAB hooks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_latte import INDUCTOR_TOLERANCE, make_inputs, make_latte
from torch import nn

import pabc

diffusers = pytest.importorskip("diffusers")

KINDS = ("spatial", "temporal", "cross", "mlp")


@pytest.fixture(scope="module")
def latte():
    return make_latte()


def generate(model, timesteps, *, inputs=None, update=0.1):
    """The outputs of all steps, [steps, ...]; each step's input depends on the one before."""
    latents, text = inputs or make_inputs()
    outputs = []
    with torch.no_grad():
        for t in timesteps:
            when = torch.full((len(latents),), int(t))
            out = model(latents, when, encoder_hidden_states=text, return_dict=False)[0]
            latents = latents - update * out
            outputs.append(out)
    return torch.stack(outputs)


TIMESTEPS = tuple(range(960, -1, -80))  # 13 steps


@pytest.mark.parametrize("cut", ["attention", "branch"])
def test_reuse_nothing_equals_eager_bit_for_bit(latte, cut):
    fast = pabc.compile(latte, pabc.Schedule.none(TIMESTEPS), backend="eager", cut=cut)
    assert torch.equal(generate(fast, TIMESTEPS), generate(latte, TIMESTEPS))


@st.composite
def schedules(draw):
    num_steps = draw(st.integers(1, 6))
    masks = {
        kind: [
            False,
            *draw(st.lists(st.booleans(), min_size=num_steps - 1, max_size=num_steps - 1)),
        ]
        for kind in draw(st.sets(st.sampled_from(KINDS)))
    }
    schedule = pabc.Schedule.from_masks(range(num_steps, 0, -1), masks)
    for _ in range(draw(st.integers(0, 2))):
        mask = draw(st.lists(st.booleans(), min_size=num_steps - 1, max_size=num_steps - 1))
        kind, layer = draw(st.sampled_from(KINDS)), draw(st.integers(0, 1))
        schedule = schedule.override(kind=kind, layers=layer, mask=[False, *mask])
    return schedule


@pytest.fixture(scope="module", params=["attention", "branch"])
def eager_and_oracle(latte, request):
    schedule = pabc.Schedule.none(TIMESTEPS)
    backends = ("eager", "oracle")
    return [pabc.compile(latte, schedule, backend=b, cut=request.param) for b in backends]


@settings(max_examples=12, deadline=None)
@given(schedule=schedules())
def test_random_schedules_equal_the_oracle_bit_for_bit(eager_and_oracle, schedule):
    runs = []
    for compiled in eager_and_oracle:
        compiled.reset()
        compiled.schedule = schedule
        runs.append(generate(compiled, schedule.timesteps))
    assert torch.equal(*runs)


def test_second_generation_starts_afresh(latte):
    schedule = pabc.Schedule.pyramid(TIMESTEPS, spatial=2, temporal=3, cross=4)
    fast = pabc.compile(latte, schedule, backend="eager")
    first = generate(fast, TIMESTEPS)
    assert torch.equal(generate(fast, TIMESTEPS), first)  # by itself, after the last step
    generate(fast, TIMESTEPS[:5])
    fast.reset()
    assert torch.equal(generate(fast, TIMESTEPS), first)


def test_inductor_equals_the_oracle(latte):
    schedule = pabc.Schedule.pyramid(
        TIMESTEPS, spatial=2, temporal=4, cross=6, fraction=(0.15, 0.85)
    )
    fast, oracle = (pabc.compile(latte, schedule, backend=b) for b in ("inductor", "oracle"))
    error = (generate(fast, TIMESTEPS) - generate(oracle, TIMESTEPS)).abs().max()
    assert error < INDUCTOR_TOLERANCE
    again = (generate(fast, TIMESTEPS) - generate(oracle, TIMESTEPS)).abs().max()
    assert again < INDUCTOR_TOLERANCE


def test_inductor_follows_new_weights_without_recompiling():
    model = make_latte(num_layers=1)
    schedule = pabc.Schedule.pyramid(TIMESTEPS[:4], spatial=2)
    fast = pabc.compile(model, schedule)
    generate(fast, TIMESTEPS[:4])
    seconds = fast.explain().compile_seconds
    before = torch._dynamo.utils.counters["inductor"].copy()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    model.proj_out.weight = nn.Parameter(model.proj_out.weight * 2)  # replaced, not in place
    outputs = generate(fast, TIMESTEPS[:4])
    oracle = pabc.compile(model, schedule, backend="oracle")
    assert (outputs - generate(oracle, TIMESTEPS[:4])).abs().max() < INDUCTOR_TOLERANCE
    assert fast.explain().compile_seconds == seconds
    assert torch._dynamo.utils.counters["inductor"] == before


def apply_hooks(model, timestep, *, ranges, window):
    """diffusers' PAB as its documentation says, with identifiers that fit Latte's module names."""
    diffusers.apply_pyramid_attention_broadcast(
        model,
        diffusers.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=ranges["spatial"],
            temporal_attention_block_skip_range=ranges["temporal"],
            cross_attention_block_skip_range=ranges["cross"],
            spatial_attention_timestep_skip_range=window,
            temporal_attention_timestep_skip_range=window,
            cross_attention_timestep_skip_range=window,
            spatial_attention_block_identifiers=(r"^transformer_blocks\.",),
            temporal_attention_block_identifiers=(r"^temporal_transformer_blocks\.",),
            cross_attention_block_identifiers=(r"^transformer_blocks\.",),
            current_timestep_callback=timestep,
        ),
    )


@pytest.mark.parametrize("ranges", [(2, 3, 6), (2, 4, 6), (3, 2, 5)])
def test_cut_attention_equals_diffusers_hooks_at_every_step(latte, ranges):
    timesteps = tuple(range(980, -1, -20))
    ranges = dict(zip(("spatial", "temporal", "cross"), ranges, strict=True))
    hooked, now = copy.deepcopy(latte), []
    apply_hooks(hooked, lambda: now[-1], ranges=ranges, window=(100, 800))

    def call(latents, when, **kwargs):
        now.append(int(when[0]))
        return hooked(latents, when, **kwargs)

    schedule = pabc.Schedule.pyramid(timesteps, **ranges, window=(100, 800))
    fast = pabc.compile(latte, schedule, backend="eager", cut="attention")
    outputs, expected = generate(fast, timesteps), generate(call, timesteps)
    assert (outputs - expected).abs().max() <= 1e-5
    assert not torch.equal(outputs, generate(latte, timesteps)), "nothing was reused"


def test_attention_kinds_of_latte(latte):
    latents, text = make_inputs()
    found = pabc.explain(latte, latents, torch.tensor([3, 3]), encoder_hidden_states=text)
    expected = {}
    for i in range(2):
        expected[f"transformer_blocks.{i}.attn1"] = "spatial"
        expected[f"transformer_blocks.{i}.attn2"] = "cross"
        expected[f"temporal_transformer_blocks.{i}.attn1"] = "temporal"
    assert found.attention == expected
    assert not found.outside


def test_five_phases_without_reused_attention(latte):
    timesteps = range(980, -1, -20)
    schedule = pabc.Schedule.pyramid(
        timesteps, spatial=2, temporal=4, cross=6, fraction=(0.15, 0.85)
    )
    latents, text = make_inputs()
    example = ((latents, torch.tensor([3, 3]), text), {})
    fast = pabc.compile(latte, schedule, backend="eager", example_inputs=example)
    assert len(fast.phases) == 5
    for phase, module in zip(fast.plan.phases, fast.phases, strict=True):
        reused = {fast.plan.slots[slot].kind for slot in phase.reused}
        called = [str(n.target) for n in module.graph.nodes if n.op == "call_module"]
        kinds = {name.rpartition("_")[0] for name in called}
        assert kinds == {"spatial", "temporal", "cross", "mlp"} - reused
        left = [
            node.meta["attention"].kind
            for graph in (module, *(module.get_submodule(name) for name in called))
            for node in graph.graph.nodes
            if "scaled_dot_product_attention" in str(node.target)
        ]
        assert not reused & set(left)
        assert len(left) == 2 * len({"spatial", "temporal", "cross"} - reused)


def test_pretrained_models_have_frozen_configurations(latte, tmp_path):
    """Capture looks through the model's attributes, and some containers refuse to be written to."""
    latte.save_pretrained(tmp_path)
    loaded = diffusers.LatteTransformer3DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    schedule = pabc.Schedule.none(TIMESTEPS[:1])
    fast = pabc.compile(loaded.eval(), schedule, backend="eager")
    assert torch.equal(generate(fast, TIMESTEPS[:1]), generate(latte, TIMESTEPS[:1]))
