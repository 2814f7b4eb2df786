import pytest
import torch
import torch.nn.functional as F
from graphs import assert_same_graph
from models import OneBranch
from stages import apply, capture_call, facts_of, latents_of, run_to
from torch import nn

from pabc.passes import Axis, Captured, Denoised, Factor, name_axes_pass, verify_axes
from pabc.passes.ir import output_node


class Function(nn.Module):
    """f(x) beside x itself, which makes x the latents."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, y=None):
        return x * 2, self.function(x) if y is None else self.function(x, y)


X_SHAPE, Y_SHAPE = (2, 4, 3, 6), (2, 5, 3, 6)


def axes_after(function, *, with_y=False):
    """Per dimension of the result, the axes it runs along: `2` is dimension 2 of x, `y2` of y."""
    call = {"x": torch.randn(X_SHAPE)} | ({"y": torch.randn(Y_SHAPE)} if with_y else {})
    gm = run_to(capture_call(Function(function), call), "axes")
    result = output_node(gm.graph).args[0][1]
    names = {"x": "", "y": "y"}
    return [
        "".join(f"{names[a.source]}{a.dim}" for f in product for a in f.axes()) or "-"
        for product in result.meta["axes"]
    ]


WEIGHT, KERNEL = torch.randn(7, 6), torch.randn(5, 4, 1, 2)
INDEX = torch.tensor([2, 0])
TABLE = torch.tensor([[2, 0, 1], [1, 3, 2]])
EXPECTED = {
    "view merges": (lambda x: x.view(8, 18), ["01", "23"]),
    "view splits": (lambda x: x.view(2, 2, 2, 18), ["0", "1", "1", "23"]),
    "view cuts across": (lambda x: x.view(2, 6, 2, 6), ["0", "12", "12", "3"]),
    "view cuts across features": (
        lambda x: x.unflatten(3, (3, 2)).permute(0, 1, 3, 2, 4).reshape(2, 4, 2, 9),
        ["0", "1", "23", "23"],
    ),
    "view cuts across repeats": (
        lambda x: x.repeat_interleave(4, 1).transpose(1, 2).flatten(2, 3).view(2, 3, 6, 16),
        ["0", "2", "13", "13"],
    ),
    "reshape after permute": (lambda x: x.permute(0, 2, 1, 3).reshape(6, 24), ["02", "13"]),
    "transpose": (lambda x: x.transpose(1, -1), ["0", "3", "2", "1"]),
    "unsqueeze": (lambda x: x[:, None], ["0", "-", "1", "2", "3"]),
    "squeeze": (lambda x: x[:, :1].squeeze(1), ["0", "2", "3"]),
    "expand": (lambda x: x[:, :, :1].expand(-1, -1, 5, -1), ["0", "1", "-", "3"]),
    "slice": (lambda x: x[:, 1:3], ["0", "1", "2", "3"]),
    "strided slice": (lambda x: x[..., ::2], ["0", "1", "2", "3"]),
    "slice of a product": (lambda x: x.flatten(1, 2)[:, 1:], ["0", "12", "3"]),
    "slice within a product": (lambda x: x.flatten(1, 2)[:, 4:6], ["0", "2", "3"]),
    "slice of whole rows": (lambda x: x.flatten(1, 2)[:, 3:9], ["0", "12", "3"]),
    "slice from the end": (lambda x: x.flatten(1, 2)[:, -3:], ["0", "2", "3"]),
    "strided slice of a product": (lambda x: x.flatten(1, 2)[:, 1::3], ["0", "1", "3"]),
    "every second row": (lambda x: x.flatten(2)[:, :, ::2], ["0", "1", "23"]),
    "split of a product": (lambda x: x.flatten(1, 2).split(3, 1)[2], ["0", "2", "3"]),
    "index by a range": (
        lambda x: x.flatten(1, 2)[:, torch.arange(6, 9)],
        ["0", "2", "3"],
    ),
    "index_select by a range": (
        lambda x: x.flatten(1, 2).index_select(1, torch.arange(0, 12, 3)),
        ["0", "1", "3"],
    ),
    "select": (lambda x: x[:, 1], ["0", "2", "3"]),
    "unbind": (lambda x: x.unbind(2)[1], ["0", "1", "3"]),
    "split": (lambda x: x.split([1, 3], 1)[1], ["0", "1", "2", "3"]),
    "chunk": (lambda x: x.chunk(2, -1)[0], ["0", "1", "2", "3"]),
    "roll": (lambda x: x.roll((1, 1), (1, 2)), ["0", "1", "2", "3"]),
    "flip": (lambda x: x.flip(1), ["0", "1", "2", "3"]),
    "repeat": (lambda x: x.repeat(1, 1, 2, 1), ["0", "1", "2", "3"]),
    "repeat adds dimensions": (lambda x: x.repeat(5, 1, 1, 1, 1), ["-", "0", "1", "2", "3"]),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), ["0", "1", "2", "3"]),
    "index_select": (lambda x: x.index_select(2, INDEX), ["0", "1", "2", "3"]),
    "stack": (lambda x: torch.stack([x, x + 1], 1), ["0", "-", "1", "2", "3"]),
    "mean": (lambda x: x.mean(2), ["0", "1", "3"]),
    "mean keeps": (lambda x: x.mean(2, keepdim=True), ["0", "1", "-", "3"]),
    "sum": (lambda x: x.sum((1, 2)), ["0", "3"]),
    "linear": (lambda x: F.linear(x, WEIGHT), ["0", "1", "2", "-"]),
    "matmul by a weight": (lambda x: x @ WEIGHT.T, ["0", "1", "2", "-"]),
    "matmul of the latents": (lambda x: x @ x.transpose(-1, -2), ["0", "1", "2", "2"]),
    "norms": (lambda x: F.layer_norm(x, (6,)), ["0", "1", "2", "3"]),
    "group norm": (lambda x: F.group_norm(x, 2), ["0", "1", "2", "3"]),
    "softmax": (lambda x: x.softmax(-1), ["0", "1", "2", "3"]),
    "conv": (lambda x: F.conv2d(x, KERNEL, stride=(1, 2)), ["0", "-", "2", "3"]),
    "transposed conv": (
        lambda x: F.conv_transpose1d(x.flatten(2), KERNEL[:4, :, 0], stride=2),
        ["0", "-", "23"],
    ),
    "concat with nothing": (lambda x: torch.cat([x, x[..., 6:]], -1), ["0", "1", "2", "3"]),
    "broadcast": (lambda x: torch.ones(6) + x, ["0", "1", "2", "3"]),
    "where": (lambda x: torch.where(torch.ones(3, 1).bool(), x, 0.0), ["0", "1", "2", "3"]),
    "embedding": (
        lambda x: F.embedding(x[:, :, 0].long().clamp(0, 5), WEIGHT.T),
        ["0", "1", "3", "-"],
    ),
    "pad": (lambda x: F.pad(x, (0, 0, 0, 1)), ["0", "1", "2", "3"]),
    "pad of a product": (lambda x: F.pad(x.flatten(1, 2), (0, 0, 1, 2)), ["0", "12", "3"]),
    "pad and back": (
        lambda x: F.pad(x.flatten(1, 2), (0, 0, 1, 2))[:, 1:13].view(2, 4, 3, 6),
        list("0123"),
    ),
    "crop by a pad": (lambda x: F.pad(x.flatten(1, 2), (0, 0, -3, 0)), ["0", "12", "3"]),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, (1, 2)), ["0", "1", "2", "3"]),
    "up": (lambda x: F.interpolate(x, scale_factor=2), ["0", "1", "2", "3"]),
    "index": (lambda x: x[:, :, [2, 0]], ["0", "1", "2", "3"]),
    "tensor unfold": (lambda x: x.unfold(3, 2, 2), ["0", "1", "2", "3", "3"]),
    "overlapping unfold": (lambda x: x.unfold(3, 3, 1), ["0", "1", "2", "3", "3"]),
    "unfold": (lambda x: F.unfold(x, (1, 2), stride=(1, 2)), ["0", "13", "23"]),
    "fold": (
        lambda x: F.fold(F.unfold(x, (1, 2), stride=(1, 2)), (3, 6), (1, 2), stride=(1, 2)),
        ["0", "1", "2", "33"],
    ),
    "pixel_unshuffle": (
        lambda x: F.pixel_unshuffle(x.transpose(2, 3)[:, :, :, :2], 2),
        ["0", "132", "3", "2"],
    ),
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), ["0", "1", "21", "31"]),
    "complex": (
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * 1j),
        ["0", "1", "2", "3", "3"],
    ),
    "hstack": (lambda x: torch.hstack([x, x + 1]), ["0", "11", "2", "3"]),
    "column_stack": (lambda x: torch.column_stack([x, x + 1]), ["0", "11", "2", "3"]),
    "concatenate": (lambda x: torch.concatenate([x, x + 1], 2), ["0", "1", "22", "3"]),
    "tile": (lambda x: x.tile(1, 2, 1, 1), ["0", "1", "2", "3"]),
    "std": (lambda x: x.std(1), ["0", "2", "3"]),
    "tensordot": (lambda x: torch.tensordot(x, WEIGHT, dims=([3], [1])), ["0", "1", "2", "-"]),
    "outer": (lambda x: torch.outer(x[0, :, 0, 0], x[0, 0, :, 0]), ["1", "2"]),
    "distances": (lambda x: torch.cdist(x, x[:, :, :2]), ["0", "1", "2", "2"]),
    "vector norm": (lambda x: F.normalize(x, dim=1), ["0", "1", "2", "3"]),
    "type_as": (lambda x: torch.ones(2, 4, 3, 6).type_as(x), ["-", "-", "-", "-"]),
    "topk": (lambda x: x.topk(2, 1)[0], ["0", "1", "2", "3"]),
    "max": (lambda x: x.max(1)[0], ["0", "2", "3"]),
    "index by rows": (lambda x: x[:, x[0, :, 0, 0].argsort()], ["0", "1", "2", "3"]),
    "index by a table": (lambda x: x.flatten(0, 1)[TABLE], ["01", "01", "2", "3"]),
    "index of two": (lambda x: x[torch.arange(2)[:, None], TABLE], ["01", "1", "2", "3"]),
    "gather": (lambda x: x.gather(1, x.argsort(1)[:, :2]), ["0", "1", "2", "3"]),
    "index_add": (
        lambda x: torch.zeros_like(x).index_add(1, INDEX, x[:, :2]),
        ["0", "1", "2", "3"],
    ),
    "one_hot": (lambda x: F.one_hot(x[..., 0].long() % 3, 3), ["0", "1", "2", "-"]),
    "loop": (lambda x: torch.stack([F.linear(x[:, i], WEIGHT) for i in range(4)], 1), list("012-")),
    "loop over unbound": (lambda x: torch.stack([y * 2 for y in x.unbind(2)], 2), list("0123")),
    "loop over slices": (lambda x: torch.cat([x[i : i + 1] * 2 for i in range(2)]), list("0123")),
    "loop over parts of a product": (
        lambda x: torch.cat([x.flatten(0, 1)[i : i + 4] * 2 for i in (0, 4)]).view(x.shape),
        list("0123"),
    ),
    "loop over parts of a split": (
        lambda x: torch.cat([y * 2 for y in x.flatten(1, 2).split(3, 1)], 1).view(x.shape),
        list("0123"),
    ),
    "loop over chunks": (lambda x: torch.cat([y * 2 for y in x.chunk(4, 1)], 1), list("0123")),
    "loop into the batch": (lambda x: torch.cat([x[:, i] for i in range(4)]), ["10", "2", "3"]),
    "loop over merged": (
        lambda x: torch.stack([y.flatten(1) for y in x.unbind(1)], 1),
        ["0", "1", "23"],
    ),
    "loop in a loop": (
        lambda x: torch.stack(
            [torch.stack([x[b, t] * 2 for t in range(4)]) for b in range(2)],
        ),
        list("0123"),
    ),
    "loop with all positions": (
        lambda x: torch.stack([x[:, i] + x.mean(1) for i in range(4)], 1),
        list("0123"),
    ),
    "loop that leaves one out": (
        lambda x: torch.stack([x[:, i] for i in range(3)], 1),
        ["0", "-", "2", "3"],
    ),
    "loop that mixes": (
        lambda x: torch.stack([x[:, i] + x[:, i - 1] for i in range(4)], 1),
        ["0", "-", "2", "3"],
    ),
    "loop whose results are padded": (
        lambda x: nn.utils.rnn.pad_sequence([x[i] * 2 for i in range(2)], batch_first=True),
        list("0123"),
    ),
    "attention": (lambda x: F.scaled_dot_product_attention(x, x, x), ["0", "1", "2", "3"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_axes_after_one_op(name):
    function, expected = EXPECTED[name]
    assert axes_after(function) == expected


def test_in_place_writes_into_an_empty_tensor_keep_axes():
    def rotate(x):
        result = torch.empty_like(x)
        result[..., 0::2], result[..., 1::2] = -x[..., 1::2], x[..., 0::2]
        return result

    assert axes_after(rotate) == ["0", "1", "2", "3"]


def test_parts_written_into_an_empty_sequence_are_all_in_it():
    def pack(x, y):
        packed = x.new_zeros(2, 9, 3, 6)
        packed = packed.index_copy(1, torch.arange(0, 9, 2), y)
        return packed.index_copy(1, torch.arange(1, 9, 2), x)

    assert axes_after(pack, with_y=True) == ["0", "1y1", "2", "3"]


def test_parts_written_to_slices_are_as_if_concatenated():
    def pack(x, y):
        packed = x.new_zeros(2, 9, 3, 6)
        packed[:, :5], packed[:, 5:] = y, x
        return packed

    assert axes_after(pack, with_y=True) == ["0", "y11", "2", "3"]
    assert axes_after(lambda x, y: pack(x, y)[:, 5:], with_y=True)[1] == "1"


def test_samples_written_one_by_one_keep_their_axes():
    def fill(x):
        result = torch.zeros(x.shape)
        for i in range(2):
            result[i] = x[i] * 2
        return result

    assert axes_after(fill) == ["0", "1", "2", "3"]


def test_concatenation_keeps_each_part():
    joined = axes_after(lambda x, y: torch.cat([y, x], 1), with_y=True)
    assert joined == ["0", "y11", "2", "3"]
    back = axes_after(lambda x, y: torch.cat([y, x], 1)[:, 5:], with_y=True)
    assert back[1] == "1"
    split = axes_after(lambda x, y: torch.cat([y, x], 1).split([5, 4], 1)[0], with_y=True)
    assert split[1] == "y1"


def test_axes_through_patches_and_back():
    def patch_and_back(x):
        tokens = x.view(2, 4, 3, 3, 2).permute(0, 2, 3, 1, 4).reshape(2, 9, 8)
        tokens = F.linear(tokens, torch.ones(8, 8))
        return tokens.view(2, 3, 3, 4, 2).permute(0, 3, 1, 2, 4).reshape(2, 4, 3, 6)

    assert axes_after(patch_and_back) == ["0", "-", "2", "3"]


def test_a_lost_axis_says_which_node_lost_it():
    call = {"x": torch.randn(2, 4, 3, 6)}
    gm = run_to(capture_call(Function(lambda x: x.cumsum(1).view(2, 6, 2, 6)), call), "axes")
    result = output_node(gm.graph).args[0][1]
    assert result.meta["axes"][1][0].reason == "view (aten.view.default) mixes positions"


def test_each_factor_of_an_input_is_its_own_axis():
    gm = run_to(capture_call(Function(lambda x: x + 1), {"x": torch.randn(2, 4, 3)}), "axes")
    (x,) = (n for n in gm.graph.nodes if n.op == "placeholder")
    assert x.meta["axes"] == tuple((Factor(s, Axis("x", i)),) for i, s in enumerate((2, 4, 3)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 6))

    def forward(self, text, x):
        return (x @ self.weight) * (text @ self.weight).mean(1, keepdim=True)


def test_the_latents_are_the_input_that_comes_out_again():
    call = {"text": torch.randn(2, 5, 6), "x": torch.randn(2, 4, 6)}
    assert latents_of(run_to(capture_call(TwoInputs(), call), "axes")) == "x"


def test_stated_latents_win():
    call = {"text": torch.randn(2, 4, 6), "x": torch.randn(2, 4, 6)}
    gm = run_to(capture_call(TwoInputs(), call), "axes", latents="text")
    assert latents_of(gm) == "text"


def test_unknown_latents_are_refused():
    gm = capture_call(TwoInputs(), {"text": torch.randn(2, 4, 6), "x": torch.randn(2, 4, 6)})
    with pytest.raises(ValueError, match=r"latents: expected one of the inputs .*'x'.*found 'z'"):
        apply(name_axes_pass, gm, Captured, latents="z")


def test_no_latents_is_an_error():
    class Pooled(nn.Module):
        def forward(self, x):
            return x.mean((1, 2))

    gm = capture_call(Pooled(), {"x": torch.randn(2, 4, 6)})
    with pytest.raises(ValueError, match=r"axes come out again.*found none among \['x'\]"):
        apply(name_axes_pass, gm, Captured)


def test_verify_catches_factors_that_do_not_multiply_to_the_shape():
    gm = run_to(capture_call(Function(lambda x: x + 1), {"x": torch.randn(2, 4, 3)}), "axes")
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.meta["axes"] = ((Factor(5),), *node.meta["axes"][1:])
    with pytest.raises(AssertionError, match="multiply to"):
        verify_axes(gm)


def test_token_ids_are_the_latents_where_no_input_has_channels():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(5, 6), nn.Linear(6, 5)

        def forward(self, text, ids):
            return self.head(self.table(ids) + text.mean(1)[:, None, None]).movedim(-1, 1)

    call = {"text": torch.randn(2, 7, 6), "ids": torch.randint(0, 5, (2, 3, 4))}
    assert latents_of(run_to(capture_call(Masked(), call), "axes")) == "ids"


def test_packed_tokens_are_the_latents_but_pooled_conditions_are_not():
    class Unbatched(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(3, 6)

        def forward(self, pooled, x):
            return (self.up(x) * pooled[0]) @ self.up.weight

    call = {"pooled": torch.randn(2, 6), "x": torch.randn(5, 3)}
    assert latents_of(run_to(capture_call(Unbatched(), call), "axes")) == "x"


def test_all_inputs_that_come_out_again_are_denoised():
    class Streams(nn.Module):
        """Video and audio, the latter in a list of samples; text is joined with what comes out."""

        def forward(self, video, text, audio):
            heard = torch.stack(audio).mean((0, 1, 2))
            joined = torch.cat([text + heard, video * heard], 1)
            return joined[:, 5:], [y + video.mean((0, 1)) for y in audio], joined

    call = {
        "video": torch.randn(2, 4, 6),
        "text": torch.randn(2, 5, 6),
        "audio": [torch.randn(1, 7, 6), torch.randn(1, 7, 6)],
    }
    gm = run_to(capture_call(Streams(), call), "axes")
    assert latents_of(gm) == "video"
    streams = {"video": "video", "audio_0": "audio_0", "audio_1": "audio_0"}
    assert facts_of(gm)[Denoised].streams == streams


def test_every_tensor_is_given_the_axes_of_its_dimensions():
    """Those of x[2] are lost in a product, and come back with the stream; sizes of 1 have none."""
    gm = run_to(capture_call(OneBranch(), OneBranch.call()), "axes")

    def axes(node):
        products = node.meta.get("axes", ())
        return " ".join("*".join(str(f.axis or f.size) for f in product) for product in products)

    assert_same_graph(
        gm,
        """
        graph(%x, %t):
            # x: x[0] x[1] x[2]
            # t: t[0]
            %time = sin(%t)  # t[0]
            %rows = unsqueeze(%time, 1)  # t[0] 1
            %gate = unsqueeze(%rows, 2)  # t[0] 1 1
            %w = get_attr[project.weight]  # 4 4
            %h = linear(%x, %w)  # x[0] x[1] 4
            %o = scaled_dot_product_attention(%h, %h, %h)  # x[0] x[1] 4
            %w_out = get_attr[out.weight]  # 4 4
            %p = linear(%o, %w_out)  # x[0] x[1] 4
            %g = mul(%gate, %p)  # x[0] x[1] 4
            %y = add(%x, %g)  # x[0] x[1] x[2]
            return (%y,)
        """,
        note=axes,
    )
