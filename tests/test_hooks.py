"""Forward hooks of modules within a model, and methods that were replaced."""

import functools

import pytest
import torch
from models import Branch, Mlp, run_by_hand
from reading import FULL, MASKS, NUM_STEPS, Plain, generate, make, make_calls

import pabc
from pabc.runtime import state

NONE = pabc.Schedule.none(range(NUM_STEPS, 0, -1))


def make_model():
    return make(Plain, Branch(), Mlp(), Branch())


def record(found, module, args, output):
    found.append(output.detach().clone())


class Recorder:
    def __init__(self, found):
        self.found = found

    def __call__(self, module, args, output):
        record(self.found, module, args, output)

    def method(self, module, args, output):
        record(self.found, module, args, output)


LOOKING = {
    "closure": lambda found: lambda module, args, output: record(found, module, args, output),
    "partial": lambda found: functools.partial(record, found),
    "object": Recorder,
    "method": lambda found: Recorder(found).method,
}


@pytest.mark.parametrize("path", ["blocks.0", "blocks.0.attn", "blocks.0.attn.to_q", "blocks.1"])
@pytest.mark.parametrize("kind", LOOKING)
def test_a_hook_that_looks_on_is_called_at_every_step(kind, path):
    model, calls, expected = make_model(), make_calls(), []
    handle = model.get_submodule(path).register_forward_hook(LOOKING[kind](expected))
    generate(model, calls)
    handle.remove()
    for when in ("before", "after"):
        fast, found = pabc.compile(model, NONE, backend="eager"), []
        if when == "after":
            generate(fast, calls)
        handle = model.get_submodule(path).register_forward_hook(LOOKING[kind](found))
        generate(fast, calls)
        assert [type(x) for x in found] == [torch.Tensor] * NUM_STEPS
        assert all(map(torch.equal, found, expected))
        (line,) = fast.explain().outside
        assert line.startswith(f"{path}.hook ")
        handle.remove()
        generate(fast, calls)
        assert len(found) == NUM_STEPS
    assert fast.stats.captures == 2  # with the hook and without, which is used again


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_hook_sees_what_is_reused_and_what_is_computed(backend):
    model, calls, found, inner = make_model(), make_calls(), [], []
    attn = model.blocks[0].attn
    attn.register_forward_hook(functools.partial(record, found))
    attn.to_q.register_forward_hook(functools.partial(record, inner))
    fast = pabc.compile(model, FULL, backend=backend)
    results = generate(fast, calls)
    assert fast.stats.reused == 4  # both attentions, every second step
    seen = list(found), list(inner)
    expected = run_by_hand(model, calls, MASKS, "attention")
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    assert len(seen[0]) == len(seen[1]) == NUM_STEPS
    assert torch.equal(seen[0][0], seen[0][1]) and not torch.equal(seen[0][1], seen[0][2])
    assert not torch.equal(seen[1][0], seen[1][1])


CHANGING = {
    "output": lambda m: m.register_forward_hook(lambda m, args, y: y * 2),
    "input": lambda m: m.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:])),
    "in place": lambda m: m.register_forward_hook(lambda m, args, y: (y.mul_(2), None)[1]),
    "keywords": lambda m: m.register_forward_hook(lambda m, a, k, y: y + 1, with_kwargs=True),
}


@pytest.mark.parametrize("kind", CHANGING)
def test_a_hook_that_changes_values_is_captured(kind):
    model, calls = make_model(), make_calls()
    plain = generate(model, calls)
    fast = pabc.compile(model, NONE, backend="eager")
    for _ in range(2):
        assert all(map(torch.equal, generate(fast, calls), plain))
        handle = CHANGING[kind](model.blocks[0].attn)
        expected = generate(model, calls)
        assert not torch.equal(expected[0], plain[0])
        assert all(map(torch.equal, generate(fast, calls), expected))
        assert not fast.explain().outside
        handle.remove()
    assert fast.stats.captures == 2


def test_a_hook_that_changes_values_and_keeps_something_is_refused_by_name():
    model, found = make_model(), []
    model.blocks[0].attn.register_forward_hook(lambda m, args, y: (found.append(1), y * 2)[1])
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.hook .*one that does both"):
        generate(pabc.compile(model, NONE, backend="eager"), make_calls())
    assert not found


def skip(module, args, output):
    return args[0]


def test_a_hook_set_for_one_call_of_a_step_has_a_branch_and_a_program_of_its_own():
    """As skip-layer guidance sets it, from the third step on."""
    model, calls = make_model(), make_calls()
    fast = pabc.compile(model, NONE, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            for step, call in enumerate(calls):
                with fast.cache_context("cond"):
                    assert torch.equal(fast(**call), model(**call))
                if step >= 2:
                    handle = model.blocks[0].register_forward_hook(skip)
                    with fast.cache_context("skip"):
                        found, expected = fast(**call), model(**call)
                    handle.remove()
                    assert torch.equal(found, expected)
    assert fast.stats.captures == 2


@pytest.mark.parametrize("has_versions", sorted({state._HAS_VERSIONS, False}))
def test_a_flag_that_is_set_for_one_call_of_a_step(has_versions, monkeypatch):
    """Also where, as from Python 3.13 on, versions of dictionaries do not tell."""
    monkeypatch.setattr(state, "_HAS_VERSIONS", has_versions)

    class Switched(Branch):
        on = True

        def forward(self, x, emb_BD, text=None):
            return super().forward(x, emb_BD, text) if self.on else x

    model, calls = make(Plain, Switched(), Mlp(), Branch()), make_calls()
    fast = pabc.compile(model, NONE, backend="eager")
    with torch.no_grad():
        for call in calls:
            for on in (True, False):
                model.blocks[0].on = on
                with fast.cache_context(str(on)):
                    assert torch.equal(fast(**call), model(**call))
    assert fast.stats.captures == 2


def test_a_hook_within_a_branch_has_what_was_kept_computed_anew():
    model, calls = make_model(), make_calls()
    fast = pabc.compile(model, FULL, backend="eager")
    with torch.no_grad():
        fast(**calls[0])
        handle = model.blocks[0].attn.register_forward_hook(lambda module, args, y: y * 2)
        assert torch.equal(fast(**calls[1]), model(**calls[1]))
    handle.remove()
    assert fast.stats.fallbacks == {"model": 1}


def doubled(forward):
    return lambda self, *args, **kwargs: forward(self, *args, **kwargs) * 2


@pytest.mark.parametrize("path", ["", "blocks.0", "blocks.0.attn", "blocks.0.attn.to_q"])
@pytest.mark.parametrize("on_class", [False, True], ids=["instance", "class"])
def test_a_forward_that_is_replaced_after_compiling(path, on_class, monkeypatch):
    model, calls = make_model(), make_calls()
    fast = pabc.compile(model, NONE, backend="eager")
    plain = generate(fast, calls)
    target = model.get_submodule(path)
    with monkeypatch.context() as patch:
        if on_class:
            patch.setattr(type(target), "forward", doubled(type(target).forward))
        else:
            own = target.forward
            patch.setattr(target, "forward", lambda *args, **kw: own(*args, **kw) * 2)
        expected = generate(model, calls)
        assert not torch.equal(expected[0], plain[0])
        assert all(map(torch.equal, generate(fast, calls), expected))
    assert all(map(torch.equal, generate(fast, calls), plain))
    assert fast.stats.captures == 2


def test_a_method_of_an_object_that_a_module_holds_is_replaced_on_its_class(monkeypatch):
    class Processor:
        def __call__(self, y):
            return y + 1

    model, calls = make_model(), make_calls()
    attn = model.blocks[0].attn
    attn.processor, own = Processor(), attn.forward
    attn.forward = lambda x: attn.processor(own(x))
    fast = pabc.compile(model, NONE, backend="eager")
    assert all(map(torch.equal, generate(fast, calls), generate(model, calls)))
    monkeypatch.setattr(Processor, "__call__", lambda self, y: y * 2)
    assert all(map(torch.equal, generate(fast, calls), generate(model, calls)))


def test_a_function_of_the_models_file_that_is_replaced(monkeypatch):
    from models import attention

    model, calls = make_model(), make_calls()
    fast = pabc.compile(model, NONE, backend="eager")
    generate(fast, calls)
    monkeypatch.setattr(attention, "merge_heads", lambda x, own=attention.merge_heads: own(x) * 2)
    assert all(map(torch.equal, generate(fast, calls), generate(model, calls)))


def test_programs_of_many_states_are_not_all_kept():
    model, (call, *_) = make_model(), make_calls()
    fast = pabc.compile(model, NONE, backend="eager")
    with torch.no_grad():
        for scale in range(12):
            model.blocks[0].attn.scale = 1.0 + scale
            fast.reset()
            fast(**call)
    (kept,) = fast._programs._programs.values()
    assert len(kept) == 8
