"""What runs around a captured forward: hooks of the model itself, at each call, as without pabc."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from loops import loop_call, make_denoiser
from torch.nn.modules import module as modules
from torch.utils.flop_counter import FlopCounterMode

import pabc

STEPS = (3, 2, 1)


@pytest.fixture(params=["wrapper", "in place"])
def pair(request):
    """A model whose calls follow a schedule, how they do, and the same model without."""
    model = make_denoiser()
    plain = copy.deepcopy(model)
    fast = pabc.compile(
        model,
        pabc.Schedule.none(STEPS),
        backend="eager",
        inplace=request.param == "in place",
    )
    with torch.no_grad():
        yield model, (model if request.param == "in place" else fast), fast, plain


def run(model):
    latents, text = loop_call(num_texts=1)
    times = [torch.tensor([t * 1.0]) for t in STEPS]
    return torch.stack([model(latents, t, text) if t > 1 else model(latents, t, text_BLD=text)
                        for t in times])  # fmt: skip


def register(model, seen):
    """Hooks of every form, which note what they are given, and change it."""

    def before(module, args):
        seen.append(("before", module is model, len(args)))
        return (args[0] * 0.5, *args[1:])

    def before_with_names(module, args, kwargs):
        seen.append(("named", module is model, len(args), sorted(kwargs)))
        return args, {name: value * 2 for name, value in kwargs.items()}

    def after(module, args, result):
        seen.append(("after", module is model, float(args[0].sum())))
        return result * 3

    def after_with_names(module, args, kwargs, result):
        seen.append(("last", module is model, sorted(kwargs), float(result.sum())))

    return [
        model.register_forward_pre_hook(before),
        model.register_forward_pre_hook(before_with_names, with_kwargs=True),
        model.register_forward_hook(after),
        model.register_forward_hook(after_with_names, with_kwargs=True, prepend=True),
    ]


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_run_at_each_call(pair, when):
    model, called, fast, plain = pair
    expected = run(plain)
    found, wanted = [], []
    if when == "after":
        assert torch.equal(run(called), expected)
    handles = [*register(model, found), *register(plain, wanted)]
    assert torch.equal(run(called), run(plain))
    assert found == wanted and len(found) == 12 and fast.stats.captures <= 2
    captures = fast.stats.captures
    for handle in handles:
        handle.remove()
    assert torch.equal(run(called), expected)
    assert fast.stats.captures == captures <= 2, "hooks are no part of the graph"


def test_hooks_that_raise_end_the_generation(pair):
    model, called, _, _ = pair
    expected, seen = run(called), []

    def stop(module, args, result):
        raise KeyError("stop")

    def always(module, args, result):
        seen.append(result)

    handles = [
        model.register_forward_hook(stop),
        model.register_forward_hook(always, always_call=True),
    ]
    with pytest.raises(KeyError):
        run(called)
    assert len(seen) == 1 and torch.equal(seen[0], expected[0])
    handles[0].remove()
    with pytest.raises(TypeError):
        model(1, 2, 3, 4, 5) if called is model else called(1, 2, 3, 4, 5)
    assert seen[1] is None
    handles[1].remove()
    assert torch.equal(run(called), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_accelerate_around_the_model(pair, when):
    model, called, fast, plain = pair

    class Halve(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return (args[0] / 2, *args[1:]), kwargs

        def post_forward(self, module, output):
            return output + 1

    calls = []
    if when == "after":
        run(called)
    for each in (model, plain):
        add_hook_to_module(each, Halve())
    assert torch.equal(run(called), run(plain))
    assert calls == [model] * 3 + [plain] * 3
    for each in (model, plain):
        remove_hook_from_module(each)
    assert torch.equal(run(called), run(plain)) and fast.stats.captures <= 2


def test_hooks_on_all_modules_are_refused_but_for_those_of_torch(pair):
    _, called, _, _ = pair
    expected = run(called)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(run(called), expected)
    assert counter.get_total_flops() > 0
    handle = modules.register_module_forward_hook(lambda module, args, result: None)
    try:
        with pytest.raises(
            ValueError, match=r"hooks on all modules: expected none, found .*lambda"
        ):
            run(called)
    finally:
        handle.remove()
    assert torch.equal(run(called), expected)
