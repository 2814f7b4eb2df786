import itertools
import math
from dataclasses import replace

import pytest
import torch
from graphs import assert_same_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, Case, OneBranch
from phases import FakeTrajectory, inline, lift, placeholders, specialize, store_all
from stages import (
    apply,
    capture_call,
    compile_flat,
    facts_of,
    regions_of,
    run_graph,
    run_to,
    with_hoisted,
)

from pabc.kernels.dtypes import FP8, FP8_MAX, TINY
from pabc.passes import (
    Captured,
    Region,
    Regions,
    encode_cuts_pass,
)
from pabc.passes.encode import decode, encode, form_of
from pabc.passes.guard_ops import cache_read, decode_cached, encode_unless, forecast_cached
from pabc.runtime.bindings import slot_specs

CASES = [c for c in MODELS if c.name in ("Factorized", "JointText", "Refined")]
FACTORIZED = CASES[0]
(PACKED,) = (c for c in MODELS if c.name == "Packed")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ROUNDING = {"bf16": 2.0**-8, "fp8": 2.0**-4}
"""Half the distance of neighbors, over the smaller one: 8 and 4 bits of significand."""


def round_trip(cut, cache_dtype):
    form = form_of(cut, cache_dtype)
    return decode(encode(cut, form), form, cut.dtype)


def guard(case, captured, cache_dtype):
    return run_to(captured(case)[1], "encode", cache_dtype=cache_dtype)


# ---- the forms ----


@pytest.mark.parametrize("cache_dtype", ["keep", "bf16", "fp8"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, FP8])
def test_other_dtypes_are_kept_as_they_are(cache_dtype, dtype):
    cut = torch.ones(4, 8).to(dtype)
    assert form_of(cut, cache_dtype) == "keep"
    (kept,) = encode(cut, "keep")
    assert kept is cut


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_would_not_become_smaller_is_kept_as_it_is(dtype):
    wide, narrow, scalar = torch.ones(4, 64), torch.ones(4, 1), torch.tensor(1.0)
    assert form_of(wide.to(dtype), "bf16") == ("bf16" if dtype.itemsize > 2 else "keep")
    assert form_of(wide.to(dtype), "fp8") == "fp8"
    assert form_of(narrow.to(dtype), "fp8") == ("fp8" if dtype.itemsize == 8 else "keep")
    assert form_of(scalar.to(dtype), "fp8") == form_of(scalar.to(dtype), "bf16") == "keep"


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_of_the_forms(dtype):
    cut = torch.randn(2, 5, 64).to(dtype)
    values, scale = encode(cut, "fp8")
    assert values.dtype == FP8 and values.shape == cut.shape
    assert scale.dtype == torch.float32 and scale.shape == (2, 5, 1)
    (rounded,) = encode(cut, "bf16")
    assert rounded.dtype == torch.bfloat16 and rounded.shape == cut.shape


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    magnitude=st.integers(-45, 38),
    seed=st.integers(0, 2**16),
)
def test_rounding_stays_within_the_format(dtype, magnitude, seed):
    """Each element is off by half a step of its format at most, for magnitudes of any size."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp2(-6 * torch.rand(4, 16, generator=generator))
    cut = (torch.randn(4, 16, generator=generator) * spread * 10.0**magnitude).to(dtype)
    cut = torch.where(cut.isfinite(), cut, torch.zeros_like(cut))
    exact = cut.double()
    peak = exact.abs().amax(-1, keepdim=True)
    own = torch.finfo(dtype)
    for cache_dtype in ("bf16", "fp8"):
        decoded = round_trip(cut, cache_dtype)
        assert decoded.dtype == dtype and decoded.shape == cut.shape
        assert decoded.isfinite().all() or (cache_dtype == "bf16" and peak.max() > 3.38e38)
        if not decoded.isfinite().all():
            continue
        # Below the least normal number, formats have steps of one size.
        least = 2.0**-10 * (peak / FP8_MAX).clamp_min(TINY) if cache_dtype == "fp8" else 0.0
        step = ROUNDING[cache_dtype] * exact.abs() * (1 + 1e-5) + own.eps * exact.abs()
        bound = step + least + own.smallest_normal * own.eps + TINY * ROUNDING["bf16"]
        assert ((decoded.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_of_zeros_and_of_the_largest_values_stay_finite(dtype):
    largest = torch.finfo(torch.float32 if dtype == torch.float64 else dtype).max
    least = torch.finfo(dtype).smallest_normal
    rows = [[0.0] * 8, [largest, -largest] * 4, [largest, 0, 1, -1] * 2, [least, 0] * 4]
    cut = torch.tensor(rows, dtype=dtype)
    decoded = round_trip(cut, "fp8")
    assert decoded.isfinite().all()
    assert torch.equal(decoded[0], cut[0])
    torch.testing.assert_close(decoded[1], cut[1], rtol=2.0**-4, atol=0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_shows_in_the_scale_of_its_token(bad):
    cut = torch.randn(3, 8)
    cut[1, 4] = bad
    _, scale = encode(cut, "fp8")
    assert scale.isfinite().flatten().tolist() == [True, False, True]
    assert round_trip(cut, "fp8").isfinite().all(-1).tolist() == [True, False, True]


def test_layouts_without_gaps_keep_their_order_of_dimensions():
    """Ops after the cut may view it as captured."""
    cuts = [torch.randn(2, 3, 8).transpose(1, 2), torch.randn(4, 9, 16)[:, 2:5].transpose(0, 1)]
    for cut, cache_dtype in itertools.product(cuts, ("bf16", "fp8")):
        decoded = round_trip(cut, cache_dtype)
        order = sorted(range(3), key=lambda dim: -cut.stride()[dim])
        assert sorted(range(3), key=lambda dim: -decoded.stride()[dim]) == order


# ---- the pass ----


def test_keep_leaves_the_graph_as_it_is(captured):
    gm = run_to(captured(FACTORIZED)[1], "cache")
    found = apply(encode_cuts_pass, gm, Captured, Regions, cache_dtype="keep")
    assert found == (gm, facts_of(gm)[Regions])


def test_a_read_is_decoded_and_a_write_encoded(captured):
    gm = guard(FACTORIZED, captured, "fp8")
    for node in (n for n in gm.graph.nodes if n.target is cache_read):
        slot = node.args[1]
        (decoded,) = node.users
        (cached,) = decoded.users
        assert decoded.target is decode_cached and cached.target is forecast_cached
        assert encode_unless in {user.target for user in cached.users}
        region: Region = regions_of(gm)[slot]
        ((values, dtype), (scale, scale_dtype)) = region.kept
        assert (values, dtype) == (region.shapes[0], FP8)
        assert (scale, scale_dtype) == ((*values[:-1], 1), torch.float32)
    named = {n.target for n in gm.graph.nodes if str(n.target).startswith("encode_")}
    layouts = {region.shapes for region in regions_of(gm)}
    assert len(named) == len(layouts), "cuts that are alike share a codec"


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_slots_hold_the_bytes_that_regions_name(case: Case, cache_dtype, captured):
    model, _ = captured(case)
    gm = guard(case, captured, cache_dtype)
    trajectory, call = FakeTrajectory(), case.call(step=1)
    with torch.no_grad():
        assert torch.equal(run_graph(gm, call, trajectory), model(**call)), "computed: exact"
    for spec, region, kept in zip(
        slot_specs(regions_of(gm)), regions_of(gm), trajectory.writes.values(), strict=True
    ):
        assert [(tuple(t.shape), t.dtype) for t in kept] == list(region.kept)
        assert spec.nbytes == sum(t.untyped_storage().nbytes() for t in kept)


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_phases_equal_the_oracle(case: Case, cache_dtype, captured):
    gm = guard(case, captured, cache_dtype)
    slots = range(len(regions_of(gm)))
    kept, call = store_all(gm, case.call(step=0)), case.call(step=1)
    for reused in ((), (0,), tuple(slots[::2]), tuple(slots)):
        stored = [slot for slot in slots if slot not in reused]
        oracle = FakeTrajectory({slot: kept[slot] for slot in reused})
        phase = specialize(gm, reused=reused, stored=stored)
        phase.graph.lint()
        held = [tensor for slot in reused for tensor in kept[slot]]
        for graph in (phase, inline(phase)):
            with torch.no_grad():
                expected = gm(oracle, *with_hoisted(gm, call))
                outputs, results = graph(*with_hoisted(phase, call), *held)
            assert torch.equal(outputs[0], expected[0]), reused
            wanted = [tensor for slot in stored for tensor in oracle.writes[slot]]
            for result, other in zip(results, wanted, strict=True):
                result, other = result.contiguous(), other.contiguous()
                assert torch.equal(result.view(torch.uint8), other.view(torch.uint8))
            oracle.writes.clear()


def test_a_phase_takes_encoded_cuts_and_encodes_only_what_is_stored(captured):
    gm = guard(FACTORIZED, captured, "fp8")
    phase = specialize(gm, reused=(0,), stored=(1,))
    assert placeholders(phase)[-2:] == ["spatial_0_cut0", "spatial_0_cut1"]
    values, scale = [n.meta["val"] for n in phase.graph.nodes if n.op == "placeholder"][-2:]
    assert (values.dtype, scale.dtype) == (FP8, torch.float32)
    called = [n.target for n in phase.graph.nodes if n.op == "call_module"]
    assert called.count("decode_0") == called.count("encode_0") == 1


GUARDED = """
    graph(%trajectory, %x, %t):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %h = cache_read(%trajectory, 0)
        %decode = get_attr[decode_0]
        %d = decode_cached(%h, %decode)
        %c = forecast_cached(%d)
        %region = get_attr[full_0]
        %u = compute_unless(%c, %region, %x)
        %encode = get_attr[encode_0]
        %e = encode_unless(%c, %encode, %u)
        %w = cache_write(%trajectory, 0, %c, %e)
        %v = getitem(%u, 0)
        %g = mul(%gate, %v)
        %y = add(%x, %g)
        return (%y,)

    decode_0(%values):
        %cut = _to_copy(%values, dtype=torch.float32)
        return (%cut,)

    encode_0(%cut):
        %values = _to_copy(%cut, dtype=torch.bfloat16)
        return (%values,)
"""
REUSED = """
    graph(%x, %t, %kept):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %d = call_module[decode_0](%kept)
        %v = getitem(%d, 0)
        %g = mul(%gate, %v)
        %y = add(%x, %g)
        return ((%y,), ())
"""
STORED = """
    graph(%x, %t):
        %time = sin(%t)
        %rows = unsqueeze(%time, 1)
        %gate = unsqueeze(%rows, 2)
        %r = call_module[full_0](%x)
        %v = getitem(%r, 0)
        %g = mul(%gate, %v)
        %y = add(%x, %g)
        %cut = getitem(%r, 0)
        %e = call_module[encode_0](%cut)
        %kept = getitem(%e, 0)
        return ((%y,), (%kept,))
"""


def test_reads_are_decoded_and_writes_encoded_in_every_phase():
    call = OneBranch.call()
    gm = run_to(capture_call(OneBranch(), call), "encode", cache_dtype="bf16", disable=("nest",))
    assert_same_graph(gm, GUARDED)
    assert_same_graph(specialize(gm, reused=(0,)), REUSED)
    assert_same_graph(specialize(gm, stored=(0,)), STORED)


def test_graphs_for_any_sizes_encode_any_sizes():
    model, call = PACKED.model(), PACKED.call()
    gm = capture_call(model, call, dynamic=True)
    gm = run_to(gm, "encode", cache_dtype="fp8")
    region = regions_of(gm)[0]
    assert region.kept[0] == (region.shapes[0], FP8), "the sizes of the captured call"
    larger = PACKED.call(1, replace(PACKED.sizes, batch=3, height=6))
    trajectory = FakeTrajectory()
    with torch.no_grad():
        full = model(**larger)
        assert torch.equal(run_graph(gm, larger, trajectory), full)
        decoded = run_graph(gm, larger, FakeTrajectory(trajectory.writes))
    assert 0 < (decoded - full).abs().max() < 0.1 * full.abs().max()


# ---- compiled by Inductor ----


def steps_apart(a, b):
    """How many representable numbers lie between elements of two tensors in the same format."""

    def rank(tensor):
        bits = tensor.view(torch.int8).int()
        return torch.where(bits >= 0, bits, -128 - bits)

    return (rank(a) - rank(b)).abs()


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8"])
def test_inductor_decodes_alike_and_encodes_to_a_neighbor_at_most(cache_dtype, captured):
    """Of equal bytes it makes equal values, within its own tolerance. What it stores may be the
    neighboring number where its sums, which differ in the last bits, lie on two sides of a tie.
    """
    gm = guard(FACTORIZED, captured, cache_dtype)
    kept, call = store_all(gm, FACTORIZED.call(step=0)), FACTORIZED.call(step=1)
    slots = range(len(regions_of(gm)))
    reused, stored = slots[:3], slots[3:]
    phase = specialize(gm, reused=reused, stored=stored)
    flat, weights = lift(inline(phase))
    inputs = [*with_hoisted(phase, call), *(t for slot in reused for t in kept[slot])]
    with torch.no_grad():
        found = compile_flat(flat)(*weights, *inputs)
        expected = flat(*weights, *inputs)
    assert (found[0] - expected[0]).abs().max() <= 1e-5
    differing = total = 0
    for result, other in zip(found[1:], expected[1:], strict=True):
        assert (result.dtype, result.stride()) == (other.dtype, other.stride())
        if result.dtype == FP8:
            apart = steps_apart(result, other)
            assert apart.max() <= 1
            differing += int(apart.sum())
            total += apart.numel()
        else:
            tolerance = 2.0**-7 if result.dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(result, other, rtol=tolerance, atol=1e-5)
    assert differing <= 1e-3 * total
