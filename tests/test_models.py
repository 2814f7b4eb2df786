"""pabc.models against outputs recorded from the original code, and what they promise besides.

A table of all recordings ends the output: largest absolute error, decisions equal.
"""

import pytest
import torch
from recordings import FILES, load_meta, load_model, load_part

import pabc
from pabc.models import LatteClass, LatteT2V, OpenSora12, OpenSoraPlan11, OpenSoraPlan12

FORWARD_TOLERANCE = 1e-5
TRAJECTORY_TOLERANCE = 3e-5

ONE_EACH = {  # a recording per class, with every mask and option that there is
    LatteT2V: "latte_t2v_mask",
    LatteClass: "latte_class_cond",
    OpenSora12: "opensora12_stdit3_xmask",
    OpenSoraPlan11: "osp11_latte_rope",
    OpenSoraPlan12: "osp12_rope_basic",
}
TRAJECTORIES = [name for name in FILES if name.endswith("_pab_traj")]
FORWARDS = [name for name in FILES if name not in TRAJECTORIES]
PRESETS = {
    LatteT2V: pabc.presets.latte,
    OpenSora12: pabc.presets.opensora12,
    OpenSoraPlan11: pabc.presets.opensora_plan11,
    OpenSoraPlan12: pabc.presets.opensora_plan12,
}
CUTS = {OpenSoraPlan12: "attention"}  # the recorded code kept the gated branch of all others
COLUMNS = {  # kind -> the columns of its layers at one depth, in the recorded decisions
    LatteT2V: {"spatial": [0], "cross": [1], "mlp": [2, 4], "temporal": [3]},
    OpenSora12: {"spatial": [0], "cross": [1, 4], "mlp": [2, 5], "temporal": [3]},
    OpenSoraPlan11: {"spatial": [0], "cross": [1], "mlp": [2, 4], "temporal": [3]},
    OpenSoraPlan12: {"full": [0], "cross": [1]},
}


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_equals_the_original(name, add_row):
    model, _ = load_model(name)
    with torch.no_grad():
        out = model(**load_part(name, "in/"))
    expected = load_part(name, "out/")["out"]
    assert out.shape == expected.shape
    error = float((out - expected).abs().max())
    add_row("golden recordings", recording=name, error=f"{error:.1e}", decisions="")
    assert error < FORWARD_TOLERANCE


RUNS = [(name, run) for name in TRAJECTORIES for run in load_meta(name)["pab_runs"]]


@pytest.mark.parametrize(("name", "run"), RUNS)
def test_compiled_trajectory_equals_the_original(name, run, add_row):
    model, meta = load_model(name)
    timesteps, inputs, outputs = meta["timesteps"], load_part(name, "in/"), load_part(name, "out/")
    preset, cut = PRESETS[type(model)], CUTS.get(type(model), "branch")
    schedule = pabc.Schedule.none(timesteps)
    if run != "nopab":
        schedule = preset(timesteps, mlp=run == "pab_mlp")
    fast = pabc.compile(model, schedule, backend="eager", cut=cut)
    z = inputs.pop("z")
    latents = "x" if isinstance(model, OpenSora12) else "hidden_states"
    error = 0.0
    for step, t in enumerate(timesteps):
        out = fast(**{latents: z}, timestep=torch.full((len(z),), t), **inputs)
        error = max(error, float((out - outputs[f"outputs_{run}"][step]).abs().max()))
        z = z - 0.05 * out[:, : z.shape[1]]
    error = max(error, float((z - outputs[f"latents_final_{run}"]).abs().max()))

    recorded = outputs.get(f"decisions_{run}")  # [step, depth, column]
    different = find_different_decisions(fast.plan, recorded, COLUMNS[type(model)])
    equal = "" if recorded is None else "differ" if different else "equal"
    add_row("golden recordings", recording=f"{name}, {run}", error=f"{error:.1e}", decisions=equal)
    assert not different
    assert error < TRAJECTORY_TOLERANCE


def find_different_decisions(plan, recorded, columns):
    """The slots that are reused at other steps than recorded; all must be in the recording."""
    if recorded is None:
        return []
    different, num_compared = [], 0
    for index, slot in enumerate(plan.slots):
        if slot.kind not in columns:
            assert slot.kind == "mlp" and not plan.reuse[:, index].any()
            continue
        depth, which = divmod(slot.layer, len(columns[slot.kind]))
        expected = recorded[:, depth, columns[slot.kind][which]].bool()
        num_compared += 1
        if plan.reuse[:, index].tolist() != expected.tolist():
            different.append(slot)
    assert num_compared == recorded[0].numel()
    return different


@pytest.mark.parametrize("cls", ONE_EACH)
def test_export_captures_the_whole_forward(cls):
    model, _ = load_model(ONE_EACH[cls])
    inputs = load_part(ONE_EACH[cls], "in/")
    exported = torch.export.export(model, (), inputs, strict=False)
    attend = torch.ops.aten.scaled_dot_product_attention.default
    attentions = [node for node in exported.graph.nodes if node.target == attend]
    kept = [name for name, _ in model.named_modules() if name.rpartition(".")[2].startswith("attn")]
    crossed = [name for name, _ in model.named_modules() if name.endswith("cross_attn")]
    assert len(attentions) == len(kept) + len(crossed)
    with torch.no_grad():
        assert torch.equal(exported.module()(**inputs), model(**inputs))


@pytest.mark.parametrize("cls", ONE_EACH)
def test_unknown_key_is_named(cls):
    config = load_meta(ONE_EACH[cls])["config"]
    with pytest.raises(
        ValueError, match=f"{cls.__name__}: expected keys .*patch.*found 'num_layer"
    ):
        cls.from_config({**config, "num_layer": 3})


@pytest.mark.parametrize("cls", ONE_EACH)
def test_bookkeeping_keys_are_skipped(cls):
    config = load_meta(ONE_EACH[cls])["config"]
    cls.from_config({**config, "_class_name": "T2V", "torch_dtype": "float32", "x_version": "1"})


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (LatteT2V, {"norm_type": "layer_norm"}, "norm_type: expected 'ada_norm_single', found 'l"),
        (LatteT2V, {"activation_fn": "silu"}, "activation_fn: expected .*gelu.*, found 'silu'"),
        (LatteT2V, {"sample_size": None}, "LatteT2V: expected a value for sample_size, found"),
        (LatteT2V, {"num_layers": 0}, "num_layers: expected a positive integer, found 0"),
        (LatteClass, {"extras": 78}, "extras: expected 1 or 2, found 78"),
        (LatteClass, {"depth": 3}, "depth: expected an even number, found 3"),
        (LatteClass, {"num_heads": 5}, "hidden_size: expected .* 4 and of num_heads .*, found 48"),
        (OpenSora12, {"num_heads": 5}, "hidden_size: expected .* 4 and of 2 x .*, found 48"),
        (OpenSora12, {"patch_size": [2, 2]}, "patch_size: expected frames, rows .* found .2, 2."),
        (OpenSora12, {"skip_y_embedder": True}, "skip_y_embedder: expected False, found True"),
        (
            OpenSoraPlan11,
            {"compress_kv_factor": 2},
            "with use_rope compress_kv_factor 1 .* found 2",
        ),
        (OpenSoraPlan11, {"patch_size_t": 2}, "patch_size_t: expected 1, found 2"),
        (OpenSoraPlan12, {"attention_head_dim": 16}, "head_dim: expected a multiple .* found 16"),
        (OpenSoraPlan12, {"downsampler": "k155_s122"}, "downsampler: expected .* found 'k155_s1"),
    ],
)
def test_configuration_that_fits_no_model_is_refused(cls, change, message):
    config = load_meta(ONE_EACH[cls])["config"]
    with pytest.raises(ValueError, match=message):
        cls.from_config({**config, **change})


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (LatteT2V, {"hidden_states": (2, 4, 2, 6, 8)}, "expected 1 frame or 3, found 2"),
        (LatteT2V, {"encoder_attention_mask": (2, 6)}, "expected shape .2, 7. or .2, 1, 7."),
        (LatteClass, {"x": (2, 3, 4, 8, 8)}, r"x: expected shape .batch, 4, .* found \[2, 3"),
        (LatteClass, {"y": None}, "y: expected classes .* found None"),
        (OpenSora12, {"fps": None}, "fps, height, width: expected a tensor for each"),
        (OpenSora12, {"mask": (3, 9)}, "expected a divisor of 2 rows, found 3"),
        (OpenSoraPlan11, {"hidden_states": (2, 4, 3, 6, 8)}, "expected 4 frames, found 3"),
        (OpenSoraPlan11, {"attention_mask": (2, 48)}, "attention_mask: expected .* found .2, 48."),
        (OpenSoraPlan12, {"attention_mask": (2, 72)}, "attention_mask: expected .* found .2, 72."),
        (OpenSoraPlan12, {"encoder_hidden_states": (2, 2, 6, 24)}, "encoder_hidden_states: expect"),
    ],
)
def test_input_that_does_not_fit_is_refused(cls, change, message):
    model, _ = load_model(ONE_EACH[cls])
    changed = {k: None if shape is None else torch.ones(shape) for k, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        model(**{**load_part(ONE_EACH[cls], "in/"), **changed})


@pytest.mark.parametrize("cls", [LatteT2V, OpenSoraPlan11, OpenSoraPlan12])
def test_weights_load_with_and_without_the_null_text(cls):
    model = cls.from_config(load_meta(ONE_EACH[cls])["config"])
    weights = load_part(ONE_EACH[cls], "sd/")
    key = "caption_projection.y_embedding"
    without = {name: weight for name, weight in weights.items() if name != key}
    null = torch.randn(120, 24)
    for chosen in ({**without, key: null}, without, {**without, key: null}):
        model.load_state_dict(chosen, strict=True)
        assert model.state_dict().keys() == chosen.keys()
    assert torch.equal(model.state_dict()[key], null)


@pytest.mark.parametrize("cls", [LatteT2V, OpenSoraPlan11, OpenSoraPlan12])
def test_axis_of_one_in_text_and_mask_makes_no_difference(cls):
    model, _ = load_model(ONE_EACH[cls])
    inputs = load_part(ONE_EACH[cls], "in/")
    text, mask = inputs.pop("encoder_hidden_states"), inputs.pop("encoder_attention_mask")
    text, mask = text.reshape(2, -1, 24), mask.reshape(2, -1)
    with torch.no_grad():
        flat = model(encoder_hidden_states=text, encoder_attention_mask=mask, **inputs)
        deep = model(
            encoder_hidden_states=text[:, None], encoder_attention_mask=mask[:, None], **inputs
        )
    assert torch.equal(flat, deep)


def test_opensora12_masks_texts_as_if_they_were_cut():
    name = ONE_EACH[OpenSora12]
    model, _ = load_model(name)
    inputs = load_part(name, "in/")
    lengths = inputs["mask"].sum(1).tolist()
    assert len(set(lengths)) == 2
    with torch.no_grad():
        both = model(**inputs)
        for i, length in enumerate(lengths):
            one = {k: v[i : i + 1] for k, v in inputs.items() if k != "mask"}
            # The first video's size holds for the batch.
            one["height"], one["width"] = inputs["height"][:1], inputs["width"][:1]
            one["y"] = one["y"][:, :, :length]
            torch.testing.assert_close(model(**one), both[i : i + 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("patch_size", [(1, 2, 2), (2, 3, 4)])
def test_opensora12_pads_at_the_end(patch_size):
    meta = load_meta(ONE_EACH[OpenSora12])
    model = OpenSora12.from_config(meta["config"], patch_size=patch_size).eval()
    inputs = load_part(ONE_EACH[OpenSora12], "in/")
    x = torch.randn(2, 4, 5, 7, 9)
    padded = torch.zeros(2, 4, 6, 9, 12) if patch_size[0] == 2 else torch.zeros(2, 4, 5, 8, 10)
    padded[:, :, :5, :7, :9] = x
    num_frames = padded.shape[2] // patch_size[0]
    inputs["x_mask"] = torch.arange(num_frames).expand(2, -1) > 0
    with torch.no_grad():
        out = model(**{**inputs, "x": x})
        expected = model(**{**inputs, "x": padded})[:, :, :5, :7, :9]
    assert out.shape == (2, 8, 5, 7, 9)
    assert torch.equal(out, expected)


def test_opensora12_mask_of_all_frames_makes_no_difference():
    name = ONE_EACH[OpenSora12]
    model, _ = load_model(name)
    inputs = load_part(name, "in/")
    everything = torch.ones_like(inputs.pop("x_mask"))
    with torch.no_grad():
        assert torch.equal(model(**inputs, x_mask=everything), model(**inputs))


def test_latte_adds_no_time_to_a_single_frame():
    model, _ = load_model("latte_t2v_mask")
    inputs = load_part("latte_t2v_mask", "in/")
    frame = inputs["hidden_states"][:, :, :1]
    with torch.no_grad():
        out = model(**{**inputs, "hidden_states": frame})
        model.video_length = 1  # as trained on images: the only position is 0
        assert torch.equal(model(**{**inputs, "hidden_states": frame}), out)
    assert out.shape == (2, 8, 1, 6, 8)


def test_spatial_mask_hides_tokens_of_a_frame():
    model, _ = load_model("osp11_latte_basic")
    inputs = load_part("osp11_latte_basic", "in/")
    mask = torch.ones(2, 5, 8, 8)
    mask[:, :, :, 4:] = 0
    with torch.no_grad():
        plain = model(**inputs)
        assert torch.equal(model(**inputs, attention_mask=torch.ones(2, 5, 8, 8)), plain)
        masked = model(**inputs, attention_mask=mask)
        mask[:, :, ::2, 4:] = 0  # one pixel of a patch suffices for its token to count
        mask[:, :, :, 4::2] = 1
        assert torch.equal(model(**inputs, attention_mask=mask), plain)
    assert (masked - plain).abs().max() > 0.01


@pytest.mark.parametrize("num_frames", [4, 5])
def test_osp11_compresses_keys_in_the_second_half(num_frames):
    config = {**load_meta("osp11_latte_basic")["config"], "video_length": num_frames}
    model = OpenSoraPlan11.from_config(config, compress_kv_factor=2).eval()
    names = {name for name in model.state_dict() if ".sr." in name or "attn1.norm." in name}
    assert names == {
        f"{blocks}.1.attn1.{layer}.{part}"
        for blocks in ("transformer_blocks", "temporal_transformer_blocks")
        for layer in ("sr", "norm")
        for part in ("weight", "bias")
    }
    seen = {}
    for blocks in (model.transformer_blocks, model.temporal_transformer_blocks):
        blocks[1].attn1.to_k.register_forward_hook(
            lambda _, args, out, blocks=blocks: seen.update({id(blocks): out.shape[1]})
        )
    with torch.no_grad():
        out = model(
            torch.randn(2, 4, num_frames, 8, 8), torch.tensor([7, 8]), torch.randn(2, 7, 24)
        )
    assert out.shape == (2, 8, num_frames, 8, 8)
    assert list(seen.values()) == [4, (num_frames + 1) // 2]  # of 16 tokens, of the frames


def test_osp12_shares_rotary_tables_as_the_original_does():
    inputs = load_part("osp12_rope_cachequirk", "in/")
    expected = load_part("osp12_rope_cachequirk", "out/")["out"]
    model, _ = load_model("osp12_rope_cachequirk", shared_rotary_tables=False)
    with torch.no_grad():
        assert (model(**inputs) - expected).abs().max() > 0.1
        alike, _ = load_model(
            "osp12_rope_cachequirk", shared_rotary_tables=False, interpolation_scale_h=1.0
        )  # what the sharing comes to here: rows take the table of as many frames
        assert (alike(**inputs) - expected).abs().max() < FORWARD_TOLERANCE


def test_osp12_shares_rotary_tables_across_calls():
    model, _ = load_model("osp12_rope_cachequirk")
    fresh, _ = load_model("osp12_rope_cachequirk")
    alike, _ = load_model(
        "osp12_rope_cachequirk", shared_rotary_tables=False, interpolation_scale_t=1.5
    )
    inputs = load_part("osp12_rope_cachequirk", "in/")
    del inputs["attention_mask"]
    first, second = torch.randn(2, 4, 2, 6, 10), torch.randn(2, 4, 3, 8, 10)
    with torch.no_grad():
        model(**{**inputs, "hidden_states": first})  # 3 rows: the table of length 3 has their scale
        out = model(**{**inputs, "hidden_states": second})  # 3 frames take it
        assert torch.equal(out, alike(**{**inputs, "hidden_states": second}))
        assert (out - fresh(**{**inputs, "hidden_states": second})).abs().max() > 0.01
