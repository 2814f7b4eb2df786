"""After a warm-up, nothing is captured or compiled again, whatever the calls bring."""

import copy

import pytest
import torch
from models import ONE_BLOCK
from small_latte import INDUCTOR_TOLERANCE, make_inputs, make_latte
from torch import nn
from torch._dynamo.utils import counters

import pabc

TIMESTEPS = (900, 750, 600, 450, 300, 150)
SCHEDULE = pabc.Schedule.pyramid(TIMESTEPS, spatial=2, temporal=3, cross=3)
BRANCHES = ("cond", "uncond")


@pytest.fixture(scope="module")
def warm():
    """A model, compiled, after one generation; and the oracle of the same model."""
    model = make_latte(num_layers=1)
    fast = pabc.compile(model, SCHEDULE)
    generate(fast, 0)
    return model, fast, pabc.compile(model, SCHEDULE, backend="oracle")


def call(fast, seed, step, name):
    """One call of a generation that its seed tells, in a branch of its own prompt."""
    latents, text = make_inputs(seed=10 * seed + BRANCHES.index(name))
    when = torch.full((len(latents),), TIMESTEPS[step])
    with fast.cache_context(name):
        return fast(latents * (step + 1), timestep=when, encoder_hidden_states=text).sample


@torch.no_grad()
def generate(fast, seed, names=BRANCHES[:1]):
    return torch.stack([call(fast, seed, s, name) for s in range(len(TIMESTEPS)) for name in names])


def count(fast):
    """All that counts compiles: pabc's own, Dynamo's and Inductor's."""
    stats = fast.stats
    return stats.captures, stats.compiles, stats.fallbacks, copy.deepcopy(dict(counters))


def leave_weights(model):
    """Only what the calls bring changes."""


@torch.no_grad()
def change_weights_in_place(model):
    for parameter in model.parameters():
        parameter.mul_(1.01)


def replace_some_weights(model):
    block = model.transformer_blocks[0]
    for linear in (block.attn1.to_q, block.attn2.to_k, block.ff.net[2], model.proj_out):
        linear.weight = nn.Parameter(linear.weight.detach() * 1.01)


def replace_all_weights(model):
    state = {name: 0.99 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def run_prompts(fast):
    return torch.cat([generate(fast, seed) for seed in (1, 2)])


def run_guided(fast):
    return generate(fast, 3, BRANCHES)


def run_in_turns(fast):
    trajectories = [fast.trajectory() for _ in range(2)]
    outputs = []
    with torch.no_grad():
        for step in range(len(TIMESTEPS)):
            for seed, trajectory in enumerate(trajectories):
                with trajectory:
                    outputs += [call(fast, 7 + seed, step, name) for name in BRANCHES]
    return torch.stack(outputs)


@pytest.mark.parametrize("run", [run_prompts, run_guided, run_in_turns])
@pytest.mark.parametrize(
    "change", [leave_weights, change_weights_in_place, replace_some_weights, replace_all_weights]
)
def test_nothing_is_compiled_after_the_warm_up(warm, change, run):
    model, fast, oracle = warm
    before, num_reused = count(fast), fast.stats.reused
    change(model)
    found = run(fast)
    assert count(fast) == before
    assert fast.stats.reused > num_reused
    assert (found - run(oracle)).abs().max() < INDUCTOR_TOLERANCE


def test_weights_replaced_within_a_generation_recompile_nothing(warm):
    model, fast, _ = warm
    _, compiles, _, inductor = count(fast)
    with torch.no_grad():
        for step in range(3):
            call(fast, 9, step, "cond")
        model.proj_out.weight = nn.Parameter(model.proj_out.weight.detach() * 1.01)
        for step in range(3, len(TIMESTEPS)):
            call(fast, 9, step, "cond")
    assert (fast.stats.compiles, dict(counters)) == (compiles, inductor)
    assert fast.stats.fallbacks["weights"] == 1, "what the old weights gave was not reused"


def test_the_counters_see_a_compile():
    fast = pabc.compile(ONE_BLOCK.model(), pabc.Schedule.none(range(2)))
    before = count(fast)
    with torch.no_grad():
        fast(**ONE_BLOCK.call())
    captures, compiles, _, inductor = count(fast)
    assert (captures, compiles) == (1, 1) and inductor != before[3]
    assert fast.stats.blocks > 1
