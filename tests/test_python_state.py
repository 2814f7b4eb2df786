"""A model is captured anew where something that its forward reads beside the arguments changes."""

from __future__ import annotations

import types
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pabc
from pabc.passes import walk_from

pytestmark = pytest.mark.runtime
TIMESTEPS = (900.0, 600.0, 300.0)
settings = types.ModuleType("settings_of_a_user")
settings.SCALE = 1.5
offset = torch.ones(4)


class Scale:
    """An object that a model may hold, or call."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.scale


chosen = Scale(1.5)


class Slotted:
    __slots__ = ("__scale",)

    def __init__(self, scale: float) -> None:
        self.set(scale)

    def set(self, scale: float) -> None:
        self.__scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.__scale


class Model(nn.Module):
    """Applies `extra`, which reads what a test changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4).requires_grad_(False)

    def extra(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.extra(self.inner(x)) * t.view(-1, 1) / 1000


Change = Callable[[], Any]
CASES: dict[str, Callable[[], tuple[Model, Change]]] = {}


def case(make: Callable[[], tuple[Model, Change]]) -> None:
    CASES[make.__name__.replace("_", " ").strip()] = make


@case
def _a_number_beside_a_replaced_forward_of_a_plain_module():
    model = Model()
    own, inner = model.inner.forward, model.inner
    inner.strength = 1.5
    inner.forward = lambda x: own(x) * inner.strength
    return model, lambda: setattr(inner, "strength", 0.5)


@case
def _an_object_under_a_name_that_was_not_there():
    class Adapted(Model):
        def extra(self, x: Tensor) -> Tensor:
            adapter = getattr(self, "adapter", None)
            return x if adapter is None else adapter(x)

    model = Adapted()
    return model, lambda: setattr(model, "adapter", Scale(2.0))


@case
def _a_tensor_of_a_class():
    class Offset(Model):
        offset = torch.ones(4)

        def extra(self, x: Tensor) -> Tensor:
            return x + self.offset

    return Offset(), lambda: setattr(Offset, "offset", torch.zeros(4))


@case
def _a_global_tensor():
    class Offset(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x + offset

    return Offset(), lambda: globals().update(offset=offset + torch.arange(4.0))


@case
def _a_variable_that_a_method_closes_over():
    known = {"scale": 1.5}

    class Closing(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * known["scale"]

    return Closing(), lambda: known.update(scale=2.5)


@case
def _a_default_of_a_method():
    class Default(Model):
        def extra(self, x: Tensor, scales: list[float] = [1.5]) -> Tensor:  # noqa: B006
            return x * scales[0]

    return Default(), lambda: Default.extra.__defaults__[0].insert(0, 2.5)


@case
def _a_constant_of_a_module_of_the_users():
    class Configured(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * settings.SCALE

    return Configured(), lambda: setattr(settings, "SCALE", settings.SCALE + 1)


@case
def _a_global_object_at_the_address_of_the_old_one():
    class Chosen(Model):
        def extra(self, x: Tensor) -> Tensor:
            return chosen(x)

    def change() -> None:
        scale = chosen.scale
        globals().update(chosen=None)
        globals().update(chosen=Scale(scale + 1))

    return Chosen(), change


@case
def _the_order_of_keys():
    class Ordered(Model):
        def __init__(self) -> None:
            super().__init__()
            self.steps = {"double": 1, "add": 1}

        def extra(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = x * 2 if step == "double" else x + 1
            return x

    model = Ordered()
    return model, lambda: model.steps.update(double=model.steps.pop("double"))


@case
def _a_slot_with_a_private_name():
    class Private(Model):
        def __init__(self) -> None:
            super().__init__()
            self.scale = Slotted(1.5)

        def extra(self, x: Tensor) -> Tensor:
            return self.scale(x)

    model = Private()
    return model, lambda: model.scale.set(2.5)


@case
def _one_of_two_classes_of_one_name():
    class Two(Model):
        def __init__(self) -> None:
            super().__init__()
            self.scales = [type("Scales", (), {"scale": scale})() for scale in (1.5, 2.5)]

        def extra(self, x: Tensor) -> Tensor:
            return x * self.scales[0].scale

    model = Two()
    return model, lambda: setattr(type(model.scales[0]), "scale", 3.5)


@case
def _a_dictionary_behind_a_view():
    known = {"scale": 1.5}

    class Viewing(Model):
        def __init__(self) -> None:
            super().__init__()
            self.known = types.MappingProxyType(known)
            self.chain = ChainMap({}, known)

        def extra(self, x: Tensor) -> Tensor:
            return x * self.known["scale"] * self.chain["scale"]

    return Viewing(), lambda: known.update(scale=2.5)


@case
def _a_global_in_a_method_that_python_calls_by_itself():
    class Indexed:
        def __getitem__(self, key: int) -> float:
            return settings.SCALE

    class Indexing(Model):
        def __init__(self) -> None:
            super().__init__()
            self.scales = Indexed()

        def extra(self, x: Tensor) -> Tensor:
            return x * self.scales[0]

    return Indexing(), lambda: setattr(settings, "SCALE", settings.SCALE + 1)


class Registry(OrderedDict[str, Any]):
    """Makes an object of the class under a key, as a library's table of activations does."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)(key)


class Weighted(list[float]):
    """Does not yield what it holds."""

    def __iter__(self) -> Iterator[float]:
        raise AssertionError("nobody iterates over the weights")


registry = Registry(double=lambda key: Scale(2.0))


@case
def _a_class_in_a_table_that_makes_objects():
    class Registered(Model):
        def extra(self, x: Tensor) -> Tensor:
            return registry["double"](x)

    def change() -> None:
        registry["double"] = lambda key: Scale(len(registry) + 3.0)

    registry["double"] = lambda key: Scale(2.0)
    return Registered(), change


@case
def _a_list_with_an_iterator_of_its_own():
    class Listing(Model):
        def __init__(self) -> None:
            super().__init__()
            self.weights = Weighted([2.0, 3.0])

        def extra(self, x: Tensor) -> Tensor:
            return x * self.weights[1]

    model = Listing()
    return model, lambda: model.weights.__setitem__(1, 4.0)


@pytest.mark.parametrize("installed", [False, True])
def test_settings_of_modules_are_seen_but_not_all_that_another_package_leads_to(
    installed: bool, monkeypatch: pytest.MonkeyPatch
):
    other = types.ModuleType("other_package.settings")
    other.__file__ = f"/lib/{'site-packages/' * installed}other_package/settings.py"
    other.SCALE, other.chosen = 1.5, Scale(2.0)
    monkeypatch.setitem(globals(), "settings", other)

    class Using(Model):
        def extra(self, x: Tensor) -> Tensor:
            assert len(x) == 2  # pytest makes a call of a module of its own of this
            return settings.chosen(x) * settings.SCALE

    model = Using().eval()
    assert_seen(model, lambda: setattr(other, "SCALE", 2.5), 1)
    walk = walk_from([("", "", model)])
    assert [h.path for h in walk.holders if h.path == "other_package.settings.chosen"] == (
        [] if installed else ["other_package.settings.chosen"]
    )
    assert not [h.path for h in walk.holders if "pytest" in h.path]


@case
def _the_type_of_a_number_in_a_slot():
    class Numbered:
        __slots__ = ("count",)

    class Counting(Model):
        def __init__(self) -> None:
            super().__init__()
            self.number = Numbered()
            self.number.count = 1

        def extra(self, x: Tensor) -> Tensor:
            return x * (0.5 if self.number.count is True else 2.0)

    model = Counting()
    return model, lambda: setattr(model.number, "count", True)


@pytest.mark.parametrize("settings", [{"scale": 1.5}, Scale(1.5)], ids=["dictionary", "object"])
def test_what_an_opaque_module_shares_with_a_traced_one_is_seen(settings: Any):
    """The graph calls the module that counts; the other one's scale is in the graph."""
    write = settings.__setitem__ if isinstance(settings, dict) else settings.__setattr__
    write("scale", 1.5)

    class Part(nn.Module):
        def __init__(self, counts: bool) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4).requires_grad_(False)
            self.settings, self.counts, self.calls = settings, counts, 0

        def forward(self, x: Tensor) -> Tensor:
            if self.counts:
                self.calls += 1
            held = self.settings
            return self.inner(x) * (held["scale"] if isinstance(held, dict) else held.scale)

    class Sharing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Part(True), Part(False)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.first(x) + self.second(x) * t.view(-1, 1) / 1000

    model = Sharing().eval()
    assert_seen(model, lambda: write("scale", 2.5), 1)


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_change_before_a_step_is_seen(name: str, step: int):
    model, change = CASES[name]()
    assert_seen(model.eval(), change, step)


def test_code_that_was_replaced_is_seen_at_the_start():
    """As an editor does that loads changed code into running functions."""

    class Edited(Model):
        def extra(self, x: Tensor) -> Tensor:
            return x * 2

    def other(self: Model, x: Tensor) -> Tensor:
        return x * 3

    assert_seen(Edited().eval(), lambda: setattr(Edited.extra, "__code__", other.__code__), 0)


def assert_seen(model: Model, change: Change, step: int) -> None:
    """Changes what the model reads before a step of the second generation."""
    fast = pabc.compile(model, pabc.Schedule.none(TIMESTEPS), backend="eager")
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    before = model(x, torch.ones(2))
    with torch.no_grad():
        for generation in range(2):
            for index, timestep in enumerate(TIMESTEPS):
                if (generation, index) == (1, step):
                    change()
                    assert not torch.equal(model(x, torch.ones(2)), before)
                t = torch.full((2,), timestep)
                assert torch.equal(fast(x, t), model(x, t))
    assert fast.stats.captures == 2


class Peer:
    """An object that leads to all others, each of which does so, too."""


def test_objects_that_lead_to_one_another_are_described_in_little_time_and_memory():
    peers = [Peer() for _ in range(40)]
    for number, peer in enumerate(peers):
        peer.scale = float(number)
        vars(peer).update((f"peer_{i}", other) for i, other in enumerate(peers))

    class Peering(Model):
        def __init__(self) -> None:
            super().__init__()
            self.peer = peers[3]

        def extra(self, x: Tensor) -> Tensor:
            return x * self.peer.peer_5.scale

    assert_seen(Peering().eval(), lambda: setattr(peers[5], "scale", 7.0), 1)


def test_a_recapture_names_what_changed_not_the_object_that_leads_to_it(
    caplog: pytest.LogCaptureFixture,
):
    model = Model()
    model.pipe = types.SimpleNamespace(scheduler=Scale(1.0))
    model.pipe.owner = Peer()
    model.pipe.owner.steps = Scale(0.0)
    fast = pabc.compile(model.eval(), pabc.Schedule.none(TIMESTEPS), backend="eager")
    x = torch.randn(2, 4)
    for step, timestep in enumerate(TIMESTEPS):
        model.pipe.owner.steps.scale = float(step)
        fast(x, torch.full((2,), timestep))
    messages = [r.getMessage() for r in caplog.records if r.name.startswith("pabc")]
    reason = "recaptured: scale of pipe.owner.steps changed"
    hint = "; if forward does not read it, keep it outside of the model"
    assert messages == [reason, reason + hint]
