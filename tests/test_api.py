"""The public surface: arguments and their errors, standing in for the model, dumping."""

import json

import pytest
import torch
from torch import nn

import pabc

STEPS = (3, 2, 1)


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))

    def forward(self, x, shift):
        q, k, v = self.qkv(self.norm(x) + shift).unflatten(-1, (3, 2, -1)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        o = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + shift * self.out(o.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Tiny(nn.Module):
    """An image model over packed tokens: (batch, tokens, channels)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.name = "tiny"
        self.proj = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, *, scale: float = 1.0, as_dict: bool = False):
        h = self.dropout(self.proj(x))
        for block in self.blocks:
            h = block(h, t[:, None, None] * scale)
        out = self.head(h)
        return {"sample": out} if as_dict else out


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


def test_changed_dtype_captures_anew(model, inputs):
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
    with pytest.raises(ValueError, match=r"no attention matches \['nope'\]"):
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
    assert {"0_capture.py", "7_cache.py", "phase_0.py", "phase_1.py", "region_full_0.py"} <= names
    assert pabc.Plan.from_json((folder / "plan.json").read_text()) == fast.plan
    assert "cache_read" in (folder / "7_cache.py").read_text()
    assert list(json.loads((folder / "seconds.json").read_text())) == [
        "capture",
        "canonicalize",
        "axes",
        "tag",
        "regions",
        "hoist",
        "outline",
        "cache",
    ]


def test_another_shape_mid_generation_computes(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    x, t = inputs
    fast(x, t)
    other = torch.randn(2, 4, 4)
    assert torch.equal(fast(other, t), model(other, t)), "nothing stored for this shape"


def test_changing_number_warns(model, inputs):
    fast = pabc.compile(model, SCHEDULE, backend="eager")
    fast(*inputs, scale=1.0)
    with pytest.warns(UserWarning, match=r"captured the model anew.*\['scale'\]"):
        fast(*inputs, scale=2.0)


def test_kinds_asked_for_in_vain_warn(model, inputs):
    schedule = pabc.Schedule.pyramid(STEPS, full=2, temporal=3)
    fast = pabc.compile(model, schedule, backend="eager")
    with pytest.warns(UserWarning, match=r"kind 'temporal'.*it has \['full', 'mlp'\]"):
        fast(*inputs)
    assert "nothing matches" in str(fast.explain())
