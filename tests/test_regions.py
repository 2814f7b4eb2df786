import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same_graph
from models import (
    CASES,
    WIDTH,
    Branch,
    Case,
    Image,
    Mlp,
    OneBranch,
    SharedProjection,
    attend_fused,
    merge_heads,
    run_by_hand,
    split_heads,
)
from models import Attention as Attend
from reuse import STEPS, make_masks, make_schedule
from stages import apply, capture_call, facts_of, regions_of, run_to
from torch import nn

from pabc.passes import Denoised, Marked, Tagged, mark_regions_pass, tagged, verify_marks
from pabc.passes.ir import aten, output_node


def case_params():
    return [
        pytest.param(case, cut, id=f"{case}-{cut}")
        for case in CASES
        for cut in ("attention", "branch")
    ]


@pytest.mark.parametrize(("case", "cut"), case_params())
def test_reuse_equals_hooks_by_hand(case: Case, cut, captured, compile_captured):
    """Every region with a mask of its own: the specialized graphs and the oracle give the bits of
    a cache written by hand, at every step."""
    model, _ = captured(case)
    calls = [case.call(step) for step in range(STEPS)]
    masks = make_masks(model, seed=cut)
    expected = run_by_hand(model, calls, masks, cut)
    full = run_by_hand(model, calls, {}, cut)
    assert any(not torch.equal(a, b) for a, b in zip(expected, full, strict=True))
    for backend in ("eager", "oracle"):
        compiled = compile_captured(case, make_schedule(masks), backend=backend, cut=cut)
        for step, call in enumerate(calls):
            assert torch.equal(compiled(**call), expected[step]), (backend, step)


BY_NAME = {case.name: case for case in CASES}


def outline(name, captured, **config):
    return run_to(captured(BY_NAME[name])[1], "outline", **config)


def op_name(node):
    return str(node.target).removeprefix("aten.").split(".")[0]


def find_cuts(gm):
    """Per region: its kind and the ops of its cut nodes."""
    found = []
    for region in regions_of(gm):
        body = gm.get_submodule(region.name)
        cuts = output_node(body.graph).args[0]
        found.append((region.kind, *map(op_name, cuts)))
    return found


SDPA = "scaled_dot_product_attention"


@pytest.mark.parametrize(
    ("name", "cut", "expected"),
    [
        ("Branch", "attention", [("full", "linear"), ("mlp", "linear")]),
        ("Branch", "branch", [("full", "mul"), ("mlp", "mul")]),
        ("Reversed", "attention", [("full", "linear"), ("mlp", "linear")]),
        ("Plain", "branch", [("full", "linear"), ("mlp", "mul")]),
        ("Sandwich", "attention", [("full", "layer_norm"), ("mlp", "linear")]),
        ("ModulatedAfter", "attention", [("full", "layer_norm"), ("mlp", "linear")]),
        ("GateFromHidden", "attention", [("full", "linear"), ("mlp", "linear")]),
        ("GateInside", "attention", [("full", "linear"), ("mlp", "linear")]),
        ("LayerScale", "attention", [("full", "mul"), ("mlp", "linear")]),
        ("HalfStream", "branch", [("full", "mul"), ("mlp", "mul")]),
        ("Summed", "attention", [("full", "linear"), ("mlp", "linear")]),
        ("SummedPlain", "branch", [("full", "linear"), ("mlp", "linear"), ("mlp", "mul")]),
        ("SharedProjection", "branch", [("full", "view"), ("mlp", "gelu"), ("mlp", "mul")]),
        ("TwoKeys", "attention", [("cross", "add"), ("mlp", "linear")]),
        ("TwoKinds", "attention", [("full", "view"), ("cross", "view"), ("mlp", "linear")]),
        ("FeedsQuery", "attention", [("full", "linear"), ("cross", "linear"), ("mlp", "linear")]),
    ],
)
def test_where_the_cut_is(name, cut, expected, captured):
    found = find_cuts(outline(name, captured, cut=cut))
    assert found[: len(expected)] == expected


def test_a_joint_region_has_a_cut_per_stream(captured):
    gm = outline("JointText", captured)
    joint, *others = regions_of(gm)
    assert [r.kind for r in (joint, *others)] == ["joint", "mlp", "mlp"]
    assert joint.shapes == ((2, 5, 16), (2, 8, 16)) or joint.shapes == ((2, 8, 16), (2, 5, 16))
    assert joint.nbytes == 4 * 2 * 13 * 16


def test_what_only_the_branch_needs_is_in_the_region(captured):
    """The norm, the modulation, the projections: all but the gate and the residual add."""
    gm = outline("Branch", captured)
    body = gm.get_submodule("full_0")
    ops = [op_name(n) for n in body.graph.nodes if n.op == "call_function"]
    assert ops.count("linear") == 4 and ops.count("layer_norm") == 1 and SDPA in ops
    main = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert aten.layer_norm.default not in main
    assert not any(SDPA in str(target) for target in main)


def test_attention_off_the_latents_stays_where_it_is(captured):
    gm = run_to(captured(BY_NAME["Refined"])[1], "regions")
    assert {kind for kind, _ in facts_of(gm)[Marked].branches} == {"full", "cross", "mlp"}
    left = [n.meta["attention"].kind for n in tagged(gm) if "region" not in n.meta]
    assert left == ["other", "other"]


@pytest.mark.parametrize(
    ("cut", "product", "gated"),
    [("attention", "  # region 0, cut 0", ""), ("branch", "  # region 0", "  # region 0, cut 0")],
)
def test_a_branch_is_marked_up_to_its_cut(cut, product, gated):
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "regions", cut=cut)

    def marks(node):
        return ", ".join(f"{key} {node.meta[key]}" for key in ("region", "cut") if key in node.meta)

    gate = "" if cut == "attention" else "  # region 0"
    assert_same_graph(
        gm,
        f"""
        graph(%x, %t):
            %time = sin(%t){gate}
            %rows = unsqueeze(%time, 1){gate}
            %gate = unsqueeze(%rows, 2){gate}
            %w = get_attr[project.weight]  # region 0
            %h = linear(%x, %w)  # region 0
            %o = scaled_dot_product_attention(%h, %h, %h)  # region 0
            %w_out = get_attr[out.weight]  # region 0
            %p = linear(%o, %w_out){product}
            %g = mul(%gate, %p){gated}
            %y = add(%x, %g)
            return (%y,)
        """,
        note=marks,
    )


def test_an_unknown_cut_is_refused(captured):
    gm = run_to(captured(BY_NAME["Branch"])[1], "tag")
    with pytest.raises(ValueError, match="cut: expected 'attention' or 'branch', found 'gate'"):
        apply(mark_regions_pass, gm, Denoised, Tagged, cut="gate")


def test_verify_catches_an_attention_that_is_nowhere(captured):
    gm = run_to(captured(BY_NAME["Branch"])[1], "regions")
    apply(verify_marks, gm, Marked)
    del tagged(gm)[0].meta["region"]
    with pytest.raises(AssertionError, match=r"blocks\.0\.attn"):
        apply(verify_marks, gm, Marked)


class SkipOverPlainAttention(nn.Module):
    """A long skip over blocks of which one attention has no residual of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.attn, self.mlp, self.last = Branch(), Attend(), Mlp(), Branch()

    def forward(self, x, emb, text=None):
        return x + self.last(self.mlp(self.attn(self.first(x, emb)), emb), emb)


def test_a_long_skip_is_no_region():
    """Attention without an add of its own is cut at its output, not where the skip ends."""
    gm = run_to(capture_call(Image(SkipOverPlainAttention()), BY_NAME["Branch"].call()), "outline")
    kinds = [(r.kind, r.attentions) for r in regions_of(gm)]
    assert kinds == [
        ("full", ("blocks.0.first.attn",)),
        ("full", ("blocks.0.attn",)),
        ("mlp", ()),
        ("full", ("blocks.0.last.attn",)),
    ]
    assert find_cuts(gm)[1] == ("full", "view")


class SkipOverAll(nn.Module):
    """A convolution for positions, blocks, a projection, and a skip over all of them."""

    def __init__(self):
        super().__init__()
        self.positions, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.block, self.mlp = Branch(), Mlp()

    def forward(self, x, emb, text=None):
        y = x + self.positions(x)
        return x + self.out(self.mlp(self.block(y, emb), emb))


def test_a_projection_under_a_skip_over_all_blocks_is_no_mlp():
    """Were it cut, nothing of the last block would reach the output."""
    gm = run_to(capture_call(Image(SkipOverAll()), BY_NAME["Branch"].call()), "outline")
    assert [(r.kind, r.path) for r in regions_of(gm)] == [
        ("full", "blocks.0.block.attn"),
        ("mlp", "blocks.0.mlp.mlp"),
    ]


class OneProjectionForAll(SharedProjection):
    """Query, key, value and the MLP's hidden features from one product, as in Flux 2."""

    def __init__(self):
        super().__init__()
        self.to_all = nn.Linear(WIDTH, 5 * WIDTH)

    def forward(self, x, emb, text=None):
        q, k, v, h = self.to_all(self.norm(x)).split([WIDTH, WIDTH, WIDTH, 2 * WIDTH], dim=-1)
        heads = merge_heads(attend_fused(*map(split_heads, (q, k, v))))
        return x + self.proj(torch.cat([heads, F.gelu(h)], dim=-1))


def test_an_mlp_whose_only_product_is_the_attentions_too_is_no_region():
    gm = run_to(capture_call(Image(OneProjectionForAll()), BY_NAME["Branch"].call()), "outline")
    assert [r.kind for r in regions_of(gm)] == ["full"]


class MlpOfResidualLayers(nn.Module):
    """An MLP that has residuals inside."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, emb, text=None):
        first, second, last = self.layers
        h = F.gelu(first(x))
        h = h + F.gelu(second(h))
        return x + last(h)


def test_an_mlp_with_a_residual_inside_is_one_region():
    gm = run_to(capture_call(Image(MlpOfResidualLayers()), BY_NAME["Branch"].call()), "outline")
    assert [r.kind for r in regions_of(gm)] == ["mlp"]
