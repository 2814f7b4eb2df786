"""The public surface: arguments and their errors, standing in for the model, dumping."""

import json
import math

import numpy as np
import pytest
import torch
from models import Tiny
from torch import nn

import pabc
from pabc.pipeline import GUARDING, NAMING, PHASE

STEPS = (3, 2, 1)


@pytest.fixture
def model():
    return Tiny().eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 6, 4, generator=generator), torch.tensor([0.5, 0.5])


SCHEDULE = pabc.Schedule.pyramid(STEPS, full=2)


def test_first_output_is_the_models_own(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    assert torch.equal(fast(*inputs), model(*inputs))


def test_output_type_and_spellings_of_a_call(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    x, t = inputs
    expected = model(x, t)
    assert torch.equal(fast(x, t=t, as_dict=True)["sample"], expected)
    fast.reset()
    fast(x, t)
    fast(t=t, x=x, scale=1.0)
    assert len(fast._programs) == 2, "spellings of one call share one capture"


def test_stands_in_for_the_model(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    assert fast.name == "tiny"
    assert fast.proj is model.proj
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert {id(p) for p in fast.parameters()} == {id(p) for p in model.parameters()}
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = fast.no_such_thing


def test_load_state_dict_takes_effect(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    fast(*inputs)
    fast.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
    fast.reset()
    assert torch.equal(fast(*inputs), model(*inputs))


def test_changed_dtype_is_recaptured(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    fast(*inputs)
    fast.reset()
    model.double()
    doubled = tuple(t.double() for t in inputs)
    assert torch.equal(fast(*doubled), model(*doubled))


def test_example_inputs_capture_at_once(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager", example_inputs=(inputs, {}))
    assert fast.plan.num_steps == 3
    assert len(fast.phases) == 2
    assert "cut0" in fast.phases[1].code


def test_before_capture_says_what_to_do(model):
    fast = pabc.compile(model, SCHEDULE)
    for what in (lambda: fast.plan, lambda: fast.phases, fast.explain, lambda: fast.dump("x")):
        with pytest.raises(RuntimeError, match="example_inputs"):
            what()


def test_refuses_training_mode(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    model.train()
    with pytest.raises(RuntimeError, match="training mode"):
        fast(*inputs)


def test_refuses_inputs_that_require_grad(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    x, t = inputs
    with pytest.raises(RuntimeError, match="requires grad"):
        fast(x.requires_grad_(), t)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "torch.nn.Module", {"model": len}),
        (TypeError, r"pabc\.Schedule", {"schedule": 2}),
        (ValueError, "'nvfuser'", {"backend": "nvfuser"}),
        (ValueError, "'gate'", {"cut": "gate"}),
    ],
)
def test_bad_arguments(model, error, message, arguments):
    with pytest.raises(error, match=message):
        pabc.compile(**{"model": model, "schedule": SCHEDULE, **arguments})


def test_unknown_input_name_lists_inputs(model, inputs):
    with pytest.raises(ValueError, match=r"latents: expected one of the inputs \['x', 't'"):
        pabc.explain(model, *inputs, latents="z")


def test_stated_kind_wins_and_unmatched_pattern_is_an_error(model, inputs):
    found = pabc.explain(model, *inputs, kinds={"blocks.1": "temporal"})
    assert found.attention == {"blocks.0": "full", "blocks.1": "temporal"}
    with pytest.raises(ValueError, match=r"kinds: expected patterns .* found \['nope'\]"):
        pabc.explain(model, *inputs, kinds={"nope": "full"})


def test_model_is_not_modified_by_a_capture(model, inputs):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = set(vars(model))
    pabc.compile(model, SCHEDULE, backend="eager")(*inputs)
    assert set(vars(model)) == attributes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_explain_prints_a_table(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager", example_inputs=(inputs, {}))
    found = fast.explain()
    assert [r.kind for r in found.regions] == ["full", "mlp", "full", "mlp"]
    assert found.nbytes == 4 * 2 * 6 * 8 * 4
    text = str(found)
    for expected in ("full_0", "mlp_1", "2x6x8", "GFLOP", "3 steps"):
        assert expected in text


def test_flops_count_products(model, inputs):
    found = pabc.explain(model, *inputs)
    tokens, width = 2 * 6, 8
    projections = 2 * tokens * width * 4 * width
    scores = 2 * 2 * tokens * 6 * width
    assert found.flops["full"] == 2 * (projections + scores)
    assert found.flops["mlp"] == 2 * (2 * 2 * tokens * width * 16)
    assert found.flops["outside"] == 2 * (2 * tokens * 4 * width)


def test_dump_writes_stages_phases_and_plan(model, inputs, tmp_path):
    fast = pabc.compile(model, SCHEDULE, backend="eager", example_inputs=(inputs, {}))
    folder = fast.dump(tmp_path / "dump")
    names = {path.name for path in folder.iterdir()}
    assert {"0_capture.py", "11_cache.py", "phase_0", "phase_1", "region_full_0.py"} <= names
    assert pabc.Plan.from_json((folder / "plan.json").read_text()) == fast.plan
    assert "cache_read" in (folder / "11_cache.py").read_text()
    stages = [stage.name for stage in (*NAMING, *GUARDING)]
    assert list(json.loads((folder / "seconds.json").read_text())) == stages
    for place, expected in ((folder, stages), (folder / "phase_1", [s.name for s in PHASE])):
        rows = (place / "stages.txt").read_text().splitlines()[1:]
        assert [row.split()[0] for row in rows] == expected
        for i, name in enumerate(expected):
            assert "def forward" in (place / f"{i}_{name}.py").read_text()


def test_another_shape_mid_generation_computes(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    x, t = inputs
    fast(x, t)
    other = torch.randn(2, 4, 4)
    assert torch.equal(fast(other, t), model(other, t)), "nothing stored for this shape"


class Exposed(Tiny):
    """Also returns what pabc keeps between steps: a branch, and projected text."""

    def __init__(self):
        super().__init__()
        self.text = nn.Linear(8, 8)

    def forward(self, x, t, text):
        h = self.proj(x)
        branches = [block(h, t[:, None, None]) - h for block in self.blocks]
        branch = self.blocks[0].mlp(h)
        text = self.text(text)
        h = self.blocks[1](h + branch, t[:, None, None] * text.mean())
        return self.head(h + sum(branches)), branch, branch.transpose(0, 1)[1:], text


@pytest.mark.parametrize("backend", ["eager", "oracle"])
def test_writing_to_a_result_changes_no_later_step(backend):
    model, text = Exposed().eval(), torch.randn(2, 3, 8)
    calls = [(torch.randn(2, 6, 4), torch.full((2,), 0.1 * i), text) for i in range(4)]
    schedule = pabc.Schedule.pyramid(range(4), full=2, mlp=4)
    kept = pabc.compile(model, schedule, backend=backend)
    written = pabc.compile(model, schedule, backend=backend)
    for call in calls:
        expected, results = kept(*call), written(*call)
        assert all(map(torch.equal, expected, results))
        for result in results[1:]:
            result.add_(100)
    assert (kept.plan.actions == pabc.Action.REUSE).any() and kept._last[0].prologue.steady


class Numbered(Tiny):
    """Takes a number and makes a shift of it in one of the ways that models do."""

    def forward(self, x, number, flag=False):
        h = self.proj(x)
        for block in self.blocks:
            h = block(h, self.shift(x, number, flag))
        return self.head(h)


class Embedded(Numbered):
    """As diffusers does: sinusoids of a timestep that may be a tensor or a number."""

    def shift(self, x, number, flag):
        if not torch.is_tensor(number):
            dtype = torch.float64 if isinstance(number, float) else torch.int64
            number = torch.tensor([number], dtype=dtype, device=x.device)
        elif number.ndim == 0:
            raise AssertionError("was a number in the user's call")
        frequencies = torch.exp(-torch.arange(4, dtype=torch.float32))
        angles = number.expand(len(x))[:, None].float() * frequencies
        return torch.cat([angles.cos(), angles.sin()], -1)[:, None]


class Listed(Numbered):
    def shift(self, x, number, flag):
        return torch.tensor([number] * len(x)).float()[:, None, None].sin()


class Scaled(Numbered):
    def shift(self, x, number, flag):
        return torch.full((len(x), 1, 1), 2 - number / 1000) * (1 + number % 7) ** 2 // 1


class WithIntegers(Numbered):
    """A float beside an integer tensor gives the default dtype, not the float's own."""

    def shift(self, x, number, flag):
        shift = torch.arange(8) * number
        assert shift.dtype == (torch.float32 if isinstance(number, float) else torch.int64)
        return torch.where(shift > 1, 0.5, number).float() / 999


class WithScalar(Numbered):
    """A number beside a tensor without dimensions does not change its dtype."""

    def shift(self, x, number, flag):
        shift = torch.ones((), dtype=torch.float32) * number
        assert shift.dtype == torch.float32
        return (shift - number * x.mean()) / 999


class Written(Numbered):
    def shift(self, x, number, flag):
        shift = torch.zeros(len(x), 1, 8)
        shift[..., :4] = number
        return torch.clamp(shift.add_(number), max=number).sub(number, alpha=2)


LIFTED = [Embedded, Listed, Scaled, WithIntegers, WithScalar, Written]
NUMBERS = {"float": (981.25, 961.5, 20.0, -0.125), "int": (981, 961, 20, 1)}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("make", LIFTED)
def test_a_number_that_changes_becomes_an_input(make, numbers, inputs, recwarn):
    model, x = make().eval(), inputs[0]
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    for number in numbers:
        fast.reset()
        assert torch.equal(fast(x, number), model(x, number))
    assert len(fast._programs) == 1
    assert not [w for w in recwarn if "recaptured the model" in str(w.message)]


class Branching(Numbered):
    def shift(self, x, number, flag):
        return 0.5 if number > 500 else 0.25


class Sized(Numbered):
    def shift(self, x, number, flag):
        return torch.ones(int(number)).sum() / 999


class Viewed(Numbered):
    def shift(self, x, number, flag):
        return torch.ones(1000)[: -int(number) or None].mean()


class BehindItsBack(Numbered):
    """`math` reads a float's value without asking it."""

    def shift(self, x, number, flag):
        return math.cos(number)


class AsScalar(Numbered):
    def shift(self, x, number, flag):
        return torch.add(torch.ones(8), torch.ones(8), alpha=number / 999)


@pytest.mark.parametrize("make", [Branching, Sized, Viewed, BehindItsBack, AsScalar])
def test_a_number_that_steers_stays_a_constant(make, inputs):
    model, x = make().eval(), inputs[0]
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    assert torch.equal(fast(x, 981.0), model(x, 981.0))
    for number in (20.0, 30.0):
        fast.reset()
        with pytest.warns(UserWarning, match=r"recaptured the model.*\['number'\]"):
            assert torch.equal(fast(x, number), model(x, number))


def test_a_flag_is_a_constant_beside_a_number(inputs, recwarn):
    class Flagged(Numbered):
        def shift(self, x, number, flag):
            return number / 1000 if flag else number / 500

    model, x = Flagged().eval(), inputs[0]
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    for number, flag in [(3.0, False), (2.0, False), (2.0, True), (1.0, True), (1.0, False)]:
        fast.reset()
        assert torch.equal(fast(x, number, flag), model(x, number, flag))
    assert len(fast._programs) == 2
    assert not [w for w in recwarn if "recaptured the model" in str(w.message)]


def test_of_two_numbers_that_change_one_is_a_constant(inputs):
    class Both(Numbered):
        def shift(self, x, number, flag):
            return number[0] / 1000 * torch.ones(number[1]).sum()

    model, x = Both().eval(), inputs[0]
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    fast(x, (3.0, 4))
    fast.reset()
    with pytest.warns(UserWarning, match=r"recaptured the model.*\['number_1'\]"):
        assert torch.equal(fast(x, (2.0, 5)), model(x, (2.0, 5)))
    fast.reset()
    assert torch.equal(fast(x, (1.0, 5)), model(x, (1.0, 5)))
    assert len(fast._programs) == 2


def test_numpy_numbers_are_lifted_too(inputs):
    model, x = Scaled().eval(), inputs[0]
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    for number in np.linspace(1, 3, 4):
        fast.reset()
        assert torch.equal(fast(x, number), model(x, number))
    assert len(fast._programs) == 1


def test_a_lifted_number_is_compiled_once(inputs):
    model, x = Embedded().eval(), inputs[0]
    fast = pabc.compile(model, pabc.Schedule.pyramid(range(5), full=1))
    for number in (900, 700, 500, 300, 100):
        assert torch.allclose(fast(x, number), model(x, number), atol=1e-5)
    assert len(fast._programs) == 1 and len(fast._last[0].phases.compiled) == 1


def test_kinds_asked_for_in_vain_warn(model, inputs):
    schedule = pabc.Schedule.pyramid(STEPS, full=2, temporal=3)
    fast = pabc.compile(model, schedule, backend="eager")
    with pytest.warns(
        UserWarning, match=r"kind 'temporal'.*it has \['block', 'full', 'mlp', 'model', 'stack'\]"
    ):
        fast(*inputs)
    assert "nothing matches" in str(fast.explain())
