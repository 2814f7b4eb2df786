"""What a forward leaves behind beside its result: kept, undone, or refused by name."""

import collections
import dataclasses
import itertools
import types
import warnings

import numpy as np
import pytest
import torch
from models import Branch, Mlp
from reading import NUM_STEPS, Plain, generate, make, make_calls
from torch import nn

import pabc
from pabc.passes import capture

COUNTS = collections.Counter()
SEEN = []
TOTAL = 0


def compiled(model, backend="eager", **options):
    schedule = pabc.Schedule.none(range(NUM_STEPS, 0, -1))
    return pabc.compile(model, schedule, backend=backend, **options)


def make_around(forward, **attributes):
    """A model whose first attention's forward is `forward(module, the own one, x)`."""
    torch.manual_seed(0)
    model = make(Plain, Branch(), Mlp(), Branch())
    attn = model.blocks[0].attn
    for name, value in attributes.items():
        setattr(attn, name, value)
    own = attn.forward
    attn.forward = types.MethodType(lambda self, *args: forward(self, own, *args), attn)
    return model


class Processor:
    """An object that a module holds, and that keeps what it sees."""

    def __init__(self):
        self.count, self.maps = 0, []

    def __call__(self, y):
        self.count += 1
        self.maps.append(y.detach())
        return y * self.count


@dataclasses.dataclass(slots=True)
class Slots:
    count: int = 0


def counts_on_the_module(self, own, x):
    self.count += 1
    return own(x) * self.count


def keeps_a_residual(self, own, x):
    if self.count % 2 == 0:
        self.residual = own(x)
    self.count += 1
    return self.residual


def keeps_the_first(self, own, x):
    self.first = x if self.first is None else self.first
    return own(x) + self.first


def keeps_the_last(self, own, x):
    self.last = x
    return own(x)


def grows_a_list(self, own, x):
    self.means.append(x.mean().item())
    return own(x)


def counts_in_slots(self, own, x):
    self.slots.count += 1
    return own(x) * self.slots.count


def writes_an_array(self, own, x):
    self.array[0] += 1
    return own(x) * float(self.array[0])


def writes_a_tensor(self, own, x):
    self.table.mul_(1.5)
    return own(x) * self.table


def replaces_a_buffer(self, own, x):
    self.decay = self.decay * 0.5
    return own(x) * self.decay


def adds_to_a_buffer(self, own, x):
    self.decay += 1
    return own(x) * self.decay


def uses_an_object(self, own, x):
    return self.processor(own(x))


def counts_in_a_global(self, own, x):
    global TOTAL
    TOTAL += 1
    return own(x) * TOTAL


def counts_in_a_container(self, own, x):
    COUNTS["calls"] += 1
    SEEN.append(x)
    return own(x) * COUNTS["calls"]


def forget():
    global TOTAL
    TOTAL = 0
    COUNTS.clear()
    SEEN.clear()


STATEFUL = [
    (counts_on_the_module, {"count": 0}),
    (keeps_a_residual, {"count": 0, "residual": None}),
    (keeps_the_first, {"first": None}),
    (keeps_the_last, {}),
    (grows_a_list, {"means": []}),
    (counts_in_slots, {"slots": Slots()}),
    (writes_an_array, {"array": np.zeros(1)}),
    (writes_a_tensor, {"table": torch.ones(1)}),
    (replaces_a_buffer, {"decay": nn.Buffer(torch.ones(1))}),
    (adds_to_a_buffer, {"decay": nn.Buffer(torch.ones(1))}),
    (uses_an_object, {"processor": Processor()}),
    (counts_in_a_global, {}),
    (counts_in_a_container, {}),
]


def describe(value):
    """What can be compared of what was kept."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (list, collections.deque)):
        return [describe(x) for x in value]
    if isinstance(value, Slots):
        return value.count
    if isinstance(value, Processor):
        return value.count, describe(value.maps)
    return value


def fresh(attributes):
    made = {}
    for name, value in attributes.items():
        is_plain = value is None or isinstance(value, int)
        copied = value.copy() if isinstance(value, (list, np.ndarray)) else None
        if isinstance(value, torch.Tensor):
            copied = nn.Buffer(value.clone()) if isinstance(value, nn.Buffer) else value.clone()
        made[name] = value if is_plain else type(value)() if copied is None else copied
    return made


@pytest.mark.parametrize(
    ("forward", "attributes"), STATEFUL, ids=[forward.__name__ for forward, _ in STATEFUL]
)
def test_a_module_that_keeps_state_runs_as_it_is(forward, attributes):
    calls, kept, results = make_calls(), [], []
    for wrap in (lambda model: model, compiled):
        forget()
        model = make_around(forward, **fresh(attributes))
        run = wrap(model)
        results.append(generate(run, calls))
        attn = model.blocks[0].attn
        names = {*attributes, *({"last", "residual"} & vars(attn).keys())}
        named = {name: describe(getattr(attn, name)) for name in names}
        kept.append((named, TOTAL, dict(COUNTS), describe(SEEN)))
    assert all(map(torch.equal, *results))
    assert kept[0] == kept[1]
    (line,) = run.explain().outside
    assert line.startswith("blocks.0.attn runs as it is: it ")
    assert run.stats.captures == 1


def test_what_a_module_returns_and_keeps_is_not_overwritten():
    """As compiled code does with memory that it takes for its own."""
    model = make_around(keeps_a_residual, count=0, residual=None)
    expected = generate(model, make_calls())
    model.blocks[0].attn.count = 0
    found = generate(compiled(model, "inductor"), make_calls())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_module_whose_result_nobody_needs_still_runs():
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, x):
            self.seen.append(x.clone())

    def forward(self, own, x):
        self.probe(x)
        return own(x)

    model = make_around(forward)
    model.blocks[0].attn.probe = probe = Probe()
    expected = generate(model, make_calls())
    seen, probe.seen = probe.seen, []
    for backend in ("eager", "inductor"):
        fast = compiled(model, backend)
        probe.seen.clear()
        for a, b in zip(generate(fast, make_calls()), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert len(probe.seen) == NUM_STEPS
        for a, b in zip(probe.seen, seen, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_region_with_a_module_that_keeps_state_is_computed_at_every_step():
    model = make_around(counts_on_the_module, count=0)
    schedule = pabc.Schedule.pyramid(range(NUM_STEPS, 0, -1), full=2, mlp=2)
    fast = pabc.compile(model, schedule, backend="eager")
    generate(fast, make_calls())
    assert model.blocks[0].attn.count == NUM_STEPS
    assert [region.path for region in fast.explain().regions] == ["blocks.1.mlp", "blocks.2.attn"]


def test_a_module_that_no_trace_can_enter_and_that_keeps_state_is_never_left_out():
    class Untraceable(nn.Module):
        count = 0

        def forward(self, x):
            self.count += 1
            return torch.from_numpy(x.numpy() * self.count)

    torch.manual_seed(0)
    model = make(Plain, Branch(), Mlp(), Branch())
    model.blocks[1].mlp.append(Untraceable())
    schedule = pabc.Schedule.pyramid(range(NUM_STEPS, 0, -1), mlp=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no region left that the schedule asks for
        found = generate(pabc.compile(model, schedule, backend="eager"), make_calls())
    assert model.blocks[1].mlp[-1].count == NUM_STEPS
    model.blocks[1].mlp[-1].count = 0
    assert all(map(torch.equal, found, generate(model, make_calls())))


def builds_a_table(self, own, x):
    if self.table is None:
        self.table = torch.linspace(0, 1, x.shape[-1])
    return own(x) * self.table


def builds_a_table_by_size(self, own, x):
    if x.shape not in self.tables:
        self.tables[x.shape] = torch.linspace(0, 1, x.shape[-1])
    return own(x) * self.tables[x.shape]


def notes_a_size(self, own, x):
    self.size = x.shape[-1]
    return own(x)


@pytest.mark.parametrize(
    ("forward", "attributes"),
    [
        (builds_a_table, {"table": None}),
        (builds_a_table_by_size, {"tables": {}}),
        (notes_a_size, {}),
    ],
)
def test_what_every_call_leaves_alike_is_no_loss(forward, attributes):
    model = make_around(forward, **attributes)
    fast = compiled(model)
    found = generate(fast, make_calls())
    assert all(map(torch.equal, found, generate(model, make_calls())))
    assert not fast.explain().outside
    generate(fast, make_calls())  # the model has built its table by now
    assert fast.stats.captures == 1


def test_a_model_that_keeps_state_itself_is_refused_by_name():
    class Counts(Plain):
        count = 0

        def forward(self, x_BCHW, t_B):
            self.count += 1
            return super().forward(x_BCHW, t_B)

    model = make(Counts)
    message = r"Counts: expected a forward that keeps nothing.*it changes count, from nothing to 1"
    with pytest.raises(ValueError, match=message):
        generate(compiled(model), make_calls())
    assert "count" not in vars(model)


def test_a_result_that_follows_from_an_iterator_is_refused_by_name():
    numbers = itertools.count(1)
    model = make_around(lambda self, own, x: own(x) * next(numbers))
    with pytest.raises(ValueError, match=r"expected the same result of the same.*numbers"):
        generate(compiled(model), make_calls())


# ---- arguments ----


@dataclasses.dataclass
class Cache:
    keys: object = None


class Plainly:
    def __init__(self):
        self.keys = []


class Caching(Plain):
    """Reads and writes a cache that it is passed."""

    def forward(self, x_BCHW, t_B, cache=None, write=False):
        if write:
            if isinstance(cache, dict):
                cache["keys"] = x_BCHW
            elif isinstance(cache, list):
                cache.append(x_BCHW)
            elif isinstance(cache, Cache):
                cache.keys = x_BCHW
            else:
                cache.keys.append(x_BCHW)
        return super().forward(x_BCHW, t_B)


@pytest.mark.parametrize("make_cache", [dict, list, Cache, Plainly])
def test_a_forward_that_writes_to_an_argument_is_refused_by_name(make_cache):
    model, (call, *_) = make(Caching), make_calls()
    fast, cache = compiled(model), make_cache()
    with torch.no_grad():
        assert torch.equal(fast(**call, cache=cache), model(**call, cache=cache))
        with pytest.raises(ValueError, match=r"argument cache.*does not write to, found that Cach"):
            fast(**call, cache=cache, write=True)
    held = cache if isinstance(cache, (dict, list)) else cache.keys
    assert not held  # and no fake tensor is left in it


def test_a_key_that_is_taken_out_of_a_dictionary_is_taken_out_of_the_users():
    class Pops(Plain):
        def forward(self, x_BCHW, t_B, extra=None):
            image = extra.pop("image", 0) if extra else 0
            return super().forward(x_BCHW, t_B) + image

    model, calls = make(Pops), make_calls()
    fast = compiled(model)
    given = [{"image": torch.ones(1), "other": 1} for _ in range(2)]
    with torch.no_grad():
        for call in calls:
            a, b = (f(**call, extra=e) for f, e in zip((fast, model), given, strict=True))
            assert torch.equal(a, b)
            assert given[0].keys() == given[1].keys() == {"other"}


class Pads(Plain):
    """Writes its padding into the text that it is given."""

    def __init__(self, *blocks):
        super().__init__(*blocks)
        self.pad = nn.Parameter(torch.ones(4))

    def forward(self, x_BCHW, t_B, text):
        text[:, 2:] = self.pad
        return super().forward(x_BCHW, t_B) * text.mean()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_every_call_writes_to_an_input_is_written_back(backend):
    model = make(Pads)
    fast = compiled(model, backend)
    with torch.no_grad():
        for seed in range(2):
            text = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
            ours, theirs = text.clone(), text.clone()
            for call in make_calls():
                a, b = fast(**call, text=ours), model(**call, text=theirs)
                torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
                assert torch.equal(ours, theirs) and not torch.equal(ours, text)
    assert fast.stats.captures == 1 and not fast.stats.fallbacks


def test_a_trace_writes_to_no_tensor_that_the_model_holds():
    model = make_around(writes_a_tensor, table=torch.ones(1))
    capture(model, (), make_calls()[0])
    assert torch.equal(model.blocks[0].attn.table, torch.ones(1))
