"""Runs of a host's samplers that skip calls: equal to a plain loop at the same plan, and alone."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from hosts import PlainLoop, accelerate, acceleration_of, find_host, schedule_of
from torch import Tensor

import pabc

pytestmark = pytest.mark.runtime
host = find_host()
RULES = ("skip: hold", "skip: linear", "skip: quadratic")
NESTS = pytest.mark.skipif(not host.nests, reason="the host has one run of a model at a time")
every_sampler = pytest.mark.parametrize("sampler", host.samplers)


def run_plain(schedule: pabc.Schedule, **given: Any) -> tuple[Tensor, int]:
    """Returns the latents of a plain loop at a schedule, and how many calls it made."""
    patcher = host.make()
    loop = PlainLoop(patcher.model.diffusion_model, schedule)
    return host.sample(patcher, **given), loop.num_computed


def check_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def nbytes(patcher: Any) -> int:
    return acceleration_of(patcher)._model.stats.nbytes


@every_sampler
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("rule", ["auto", "skip: linear"])
def test_a_speedup_of_one_changes_no_bit(sampler: str, cfg: float, rule: str) -> None:
    patcher = host.make()
    plain = host.sample(patcher, sampler, cfg=cfg)
    assert torch.equal(host.sample(accelerate(patcher, 1.0, rule), sampler, cfg=cfg), plain)
    assert torch.equal(host.sample(patcher, sampler, cfg=cfg), plain)


@every_sampler
@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("splits", [False, True])
def test_a_run_equals_a_plain_loop(sampler: str, cfg: float, splits: bool) -> None:
    given = {"sampler": sampler, "cfg": cfg, "splits": splits}
    fast = accelerate(host.make())
    found = host.sample(fast, **given)
    expected, num_computed = run_plain(schedule_of(fast), **given)
    check_equal(found, expected)
    report = acceleration_of(fast).report
    assert sum(report.calls.values()) - sum(report.skipped.values()) == num_computed
    assert sum(report.skipped.values()) >= num_computed // 2
    assert (host.sample(host.make(), **given) - found).abs().max() > 1e-4 * found.abs().max()


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_equals_a_plain_loop(rule: str) -> None:
    fast = accelerate(host.make(), 3.0, rule)
    found = host.sample(fast, steps=15)
    assert sum(schedule_of(fast).mask("model")) == 10
    check_equal(found, run_plain(schedule_of(fast), steps=15)[0])


def test_a_plan_that_makes_itself() -> None:
    """The first run is recorded; the second, of another prompt and seed, follows its plan."""
    patcher = host.make()
    fast = accelerate(patcher, rule="auto")
    given = {"steps": 16, "cfg": 3.0}
    assert torch.equal(host.sample(fast, **given), host.sample(patcher, **given))
    other = {**given, "seed": 1, "prompt": 7}
    found = host.sample(fast, **other)
    schedule = schedule_of(fast)
    assert schedule.reuses
    check_equal(found, run_plain(schedule, **other)[0], 1e-3)
    assert torch.equal(host.sample(fast, **other), found)
    host.sample(fast, "heun", **given)
    assert not schedule_of(fast).reuses, "another sampler is recorded anew"


def test_conditions_of_areas_and_several_prompts_are_kept_apart() -> None:
    positive = [{"context": host.context(1)}, {"context": host.context(2), "area": 4}]
    fast = accelerate(host.make())
    found = host.sample(fast, positive=positive, cfg=3.0)
    assert max(acceleration_of(fast).report.calls.values()) >= 2
    check_equal(found, run_plain(schedule_of(fast), positive=positive, cfg=3.0)[0])


@pytest.mark.parametrize(
    "before",
    [{"prompt": 5}, {"size": 12}, {"seed": 3}, {"steps": 8}, {"cfg": 3.0}, {"sampler": "heun"}],
    ids=str,
)
def test_a_run_finds_nothing_of_the_one_before(before: dict[str, Any]) -> None:
    fast = accelerate(host.make())
    alone = host.sample(fast)
    host.sample(fast, **before)
    assert torch.equal(host.sample(fast), alone)
    assert nbytes(fast) == 0


def test_an_interrupt_frees_what_is_kept_and_the_next_run_starts_anew() -> None:
    class Interrupted(Exception):
        pass

    def interrupt(step: int) -> None:
        if step == 6:
            assert nbytes(fast) > 0
            raise Interrupted

    fast = accelerate(host.make())
    alone = host.sample(fast)
    with pytest.raises(Interrupted):
        host.sample(fast, prompt=4, callback=interrupt)
    assert nbytes(fast) == 0
    assert torch.equal(host.sample(fast), alone)


def test_a_lora_before_or_after_the_node() -> None:
    patcher = host.make()
    before, after = accelerate(host.with_lora(patcher)), host.with_lora(accelerate(patcher))
    with_lora, plain = host.sample(before), host.sample(accelerate(patcher))
    assert torch.equal(host.sample(after), with_lora)
    assert not torch.equal(with_lora, plain)
    fast = accelerate(patcher)
    assert torch.equal(host.sample(fast), plain)
    assert torch.equal(host.sample(host.with_lora(fast)), with_lora)
    assert torch.equal(host.sample(fast), plain)


@pytest.mark.parametrize(
    "shares",
    [
        pytest.param(True, marks=NESTS, id="clones of one model"),
        pytest.param(False, id="two models"),
    ],
)
def test_models_of_one_workflow_do_not_meet(shares: bool) -> None:
    """One run within each step of the other."""
    patcher = host.make()
    other = patcher if shares else host.make(1)
    a, b = accelerate(patcher), accelerate(other, 3.0, "skip: hold")
    alone_a, alone_b = host.sample(a), host.sample(b, steps=5, prompt=2)
    inner = []
    found = host.sample(a, callback=lambda i: inner.append(host.sample(b, steps=5, prompt=2)))
    assert torch.equal(found, alone_a)
    assert len(inner) == 12 and all(torch.equal(each, alone_b) for each in inner)


@NESTS
def test_a_run_within_a_run_of_the_same_model() -> None:
    fast = accelerate(host.make())
    alone = host.sample(fast)
    inner = []
    found = host.sample(fast, callback=lambda i: inner.append(host.sample(fast, steps=6)))
    assert torch.equal(found, alone)
    assert all(torch.equal(each, inner[0]) for each in inner)


def test_a_sampler_that_goes_back_computes_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    patcher = host.make()
    fast = accelerate(patcher)
    found = host.sample(fast, host.restart)
    report = acceleration_of(fast).report
    assert "expected sigmas in the order of the list" in report.left
    assert "expected sigmas in the order of the list" in caplog.text
    assert 0 < sum(report.skipped.values()) < 6 and max(report.calls) <= 6
    assert nbytes(fast) == 0
    assert torch.isfinite(found).all()


def test_the_host_unloads_the_model_during_a_run() -> None:
    fast = accelerate(host.make())

    def unload(step: int) -> None:
        if step == 5:
            assert nbytes(fast) > 0
            host.unload(fast)
            assert nbytes(fast) == 0

    host.sample(fast, callback=unload)
    report = acceleration_of(fast).report
    assert "unloads" in report.left and max(report.calls) == 5


def test_nothing_is_kept_when_the_host_cleans_up() -> None:
    fast = accelerate(host.make())
    found = []
    fast.add_callback_with_key("on_cleanup", "test", lambda patcher: found.append(nbytes(fast)))
    host.sample(fast)
    assert found == [0]


def test_the_shared_model_stays_as_it_is() -> None:
    patcher = host.make()
    model = patcher.model
    before = dict(vars(model)), dict(model._modules), list(model.state_dict())
    fast = accelerate(patcher)

    def look(step: int) -> None:
        assert model._modules == before[1] and "diffusion_model" not in vars(model)

    host.sample(fast, callback=look)
    assert vars(model).keys() == before[0].keys() and list(model.state_dict()) == before[2]
    assert not patcher.wrappers and not patcher.callbacks
    assert patcher.model_options == {"transformer_options": {}}


def test_the_last_node_of_a_chain_counts() -> None:
    patcher = host.make()
    twice = accelerate(accelerate(patcher, 4.0, "skip: hold"))
    assert torch.equal(host.sample(twice), host.sample(accelerate(patcher)))


def test_a_node_that_copies_the_options_of_a_run() -> None:
    def copy_options(executor: Any, *args: Any, **kwargs: Any) -> Any:
        copied = [copy.deepcopy(x) if isinstance(x, dict) else x for x in args]
        assert any(isinstance(x, dict) for x in args)
        return executor(*copied, **kwargs)

    fast = accelerate(host.make())
    expected = host.sample(fast)
    fast.add_wrapper_with_key("apply_model", "another", copy_options)
    assert torch.equal(host.sample(fast), expected)


@pytest.mark.parametrize("is_first", [True, False])
def test_a_node_that_replaces_the_diffusion_model(
    is_first: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """As the host's own node for torch.compile does: for each call, and back."""
    patcher, calls = host.make(), list[int]()
    own = patcher.model.diffusion_model

    class Replaced(torch.nn.Module):
        dtype = own.dtype

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return own(*args, **kwargs)

    def replace(executor: Any, *args: Any, **kwargs: Any) -> Any:
        kept = executor.class_obj.diffusion_model
        executor.class_obj.diffusion_model = Replaced()
        try:
            return executor(*args, **kwargs)
        finally:
            executor.class_obj.diffusion_model = kept

    expected = host.sample(patcher)
    clone = patcher.clone() if is_first else accelerate(patcher)
    clone.add_wrapper_with_key("apply_model", "another", replace)
    fast = accelerate(clone) if is_first else clone
    found = host.sample(fast)
    assert patcher.model.diffusion_model is own
    assert len(calls) == 6 if is_first else len(calls) == 12
    assert torch.equal(found, host.sample(accelerate(patcher)) if is_first else expected)
    assert ("another node calls the diffusion model itself" in caplog.text) is not is_first


def test_a_compiled_model_equals_the_plain_one(caplog: pytest.LogCaptureFixture) -> None:
    patcher = host.make()
    plain = host.sample(patcher, cfg=3.0)
    fast = accelerate(patcher, 1.0, compile="eager")
    check_equal(host.sample(fast, cfg=3.0), plain)
    assert acceleration_of(fast)._denoiser._compiled.stats.captures >= 1, caplog.text
    both = accelerate(patcher, 2.0, compile="eager")
    check_equal(host.sample(both, cfg=3.0), host.sample(accelerate(patcher), cfg=3.0))


def test_a_model_that_cannot_be_captured_skips_all_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uncapturable(type(host.make().model.diffusion_model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if float(args[0].sum()) == 12345.0:
                return args[0]
            return super().forward(*args, **kwargs)

    patcher = host.make()
    expected = host.sample(accelerate(patcher))
    patcher.model.diffusion_model.__class__ = Uncapturable
    with caplog.at_level(logging.WARNING):
        assert torch.equal(host.sample(accelerate(patcher, compile="eager")), expected)
    assert "Uncapturable is not compiled, but called as it is" in caplog.text
