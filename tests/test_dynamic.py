"""`dynamic=True`: the graphs of one capture hold for the sizes that they claim, and no other."""

import warnings

import pytest
import sympy
import torch
from models import CASES, Sizes
from torch import nn

import pabc
from pabc import passes

BY_NAME = {case.name: case for case in CASES}
SCHEDULE = pabc.Schedule.pyramid(range(4), full=2, spatial=2, temporal=2, cross=3, joint=2, mlp=2)
IMAGE = BY_NAME["Branch"]
HINT, OTHER = Sizes(2, 3, 8, 12, 5), Sizes(3, 3, 16, 8, 7)


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pabc: the schedule asks for")
        yield


def generate(compiled, case, sizes, steps=range(4)):
    compiled.reset()
    return [compiled(**case.call(step, sizes)) for step in steps]


def num_captures(compiled):
    return len({id(p) for programs in compiled._programs._programs.values() for p in programs})


@pytest.mark.parametrize(("name", "backend"), [("Factorized", "eager"), ("JointImage", "oracle")])
def test_one_capture_serves_all_sizes(name, backend):
    """Every step of every size has the bits that a capture for that size alone gives."""
    case = BY_NAME[name]
    model = case.model()
    compiled = pabc.compile(model, SCHEDULE, backend=backend, dynamic=True)
    for sizes in (HINT, OTHER):
        fixed = pabc.compile(model, SCHEDULE, backend=backend)
        expected = generate(fixed, case, sizes)
        assert all(map(torch.equal, generate(compiled, case, sizes), expected))
        assert torch.equal(expected[0], model(**case.call(0, sizes)))
    assert num_captures(compiled) == 1


def test_sizes_that_happen_to_be_equal_are_kept_apart():
    case = BY_NAME["Factorized"]
    model = case.model()
    compiled = pabc.compile(model, SCHEDULE, backend="eager", dynamic=True)
    for sizes in (Sizes(3, 3, 6, 6, 3), Sizes(2, 3, 8, 4, 5)):
        call = case.call(0, sizes)
        compiled.reset()
        assert torch.equal(compiled(**call), model(**call))
    assert num_captures(compiled) == 1


def test_the_analysis_is_that_of_the_captured_sizes():
    model, call = IMAGE.model(), IMAGE.call(sizes=HINT)
    options = {"backend": "eager", "example_inputs": ((), call)}
    fixed = pabc.compile(model, SCHEDULE, **options)
    free = pabc.compile(model, SCHEDULE, dynamic=True, **options)
    expected, found = fixed.explain(), free.explain()
    assert (found.attention, found.regions) == (expected.attention, expected.regions)
    assert found.flops == expected.flops
    assert str(free.plan) == str(fixed.plan)
    hoisted = [len(c._last[0].prologue.graph.graph.nodes) for c in (fixed, free)]
    assert hoisted[1] >= hoisted[0], "as much is hoisted, with the sizes that it needs"
    assert free._last[0].prologue.steady == fixed._last[0].prologue.steady


def test_sizes_outside_of_what_was_captured_are_recaptured():
    case = BY_NAME["Windowed"]
    model = case.model()
    compiled = pabc.compile(model, SCHEDULE, backend="eager", dynamic=True)
    one_window_wide = Sizes(2, 3, 8, 4)
    for count, sizes in enumerate((one_window_wide, HINT, Sizes(1, 3, 8, 12), OTHER), start=1):
        call = case.call(0, sizes)
        compiled.reset()
        assert torch.equal(compiled(**call), model(**call))
        assert num_captures(compiled) == min(count, 3)


def test_other_strides_are_copied():
    model, call = IMAGE.model(), IMAGE.call(sizes=HINT)
    compiled = pabc.compile(model, SCHEDULE, backend="eager", dynamic=True)
    compiled(**call)
    for sizes in (HINT, OTHER):
        call = IMAGE.call(sizes=sizes)
        turned = call | {"x_BCHW": call["x_BCHW"].transpose(2, 3).contiguous().transpose(2, 3)}
        compiled.reset()
        assert torch.allclose(compiled(**turned), model(**turned), atol=1e-6)
    assert num_captures(compiled) == 1


def test_nothing_kept_for_other_sizes_is_reused():
    model = IMAGE.model()
    compiled = pabc.compile(model, SCHEDULE, backend="eager", dynamic=True)
    compiled(**IMAGE.call(0, HINT))
    other = IMAGE.call(1, OTHER)
    assert torch.equal(compiled(**other), model(**other))
    assert compiled._default.step == 2 and num_captures(compiled) == 1


def test_a_lifted_number_and_dynamic_shapes():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = IMAGE.model()

        def forward(self, x, time):
            return self.model(x, torch.tensor([time] * x.shape[0]), None)

    model = Timed().eval()
    compiled = pabc.compile(model, SCHEDULE, backend="eager", dynamic=True)
    for time, sizes in ((0.5, HINT), (0.25, HINT), (0.125, OTHER)):
        x = IMAGE.call(0, sizes)["x_BCHW"]
        compiled.reset()
        assert torch.equal(compiled(x, time), model(x, time))


def test_where_sizes_cannot_be_left_open_each_is_captured(monkeypatch):
    original = torch.export.export

    def refuse(*args, dynamic_shapes=None, **kwargs):
        if dynamic_shapes is not None:
            raise RuntimeError("sizes must be known")
        return original(*args, **kwargs)

    monkeypatch.setattr(torch.export, "export", refuse)
    model = IMAGE.model()
    compiled = pabc.compile(model, SCHEDULE, backend="eager", dynamic=True)
    for sizes in (HINT, OTHER):
        call = IMAGE.call(0, sizes)
        compiled.reset()
        with pytest.warns(UserWarning, match=r"shapes of this call alone, since.*must be known"):
            assert torch.equal(compiled(**call), model(**call))
    assert num_captures(compiled) == 2


def test_a_size_that_is_guarded_is_not_served():
    model = IMAGE.model()
    _, captured = passes.capture(model, (), IMAGE.call(sizes=HINT), dynamic=True)
    sizes = captured.sizes
    for fits, wanted in ((True, Sizes(4, 3, 6, 10, 2)), (False, Sizes(4, 3, 7, 10, 2))):
        inputs = list(IMAGE.call(sizes=wanted).values())
        assert (sizes.bind(inputs) is not None) == fits
    inputs[1] = inputs[1][:3]
    assert sizes.bind(inputs) is None, "the time has another batch size than the latents"


def test_inductor_compiles_per_size_from_one_capture():
    model = IMAGE.model()
    compiled = pabc.compile(model, SCHEDULE, dynamic=True)
    for sizes in (HINT, OTHER):
        expected = generate(pabc.compile(model, SCHEDULE, backend="eager"), IMAGE, sizes)
        found = generate(compiled, IMAGE, sizes)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert num_captures(compiled) == 1


def test_sizes_out_of_range_are_not_served():
    size = sympy.Symbol("s0")
    sizes = passes.Sizes(((size, 1),), {size: (2, 8)}, (), {})
    assert sizes.bind([torch.ones(8)]) == {size: 8}
    assert sizes.bind([torch.ones(1)]) is None
    assert sizes.bind([torch.ones(9)]) is None
