"""What tests of the norms' kernels share: arguments in several layouts, and the definition."""

import torch
from torch.nn.functional import layer_norm, rms_norm

from pabc.kernels.dtypes import FP8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lay_out(x, layout):
    """The same values at other strides."""
    if layout == "columns":  # channels far apart, as after a convolution
        order = [0, x.ndim - 1, *range(1, x.ndim - 1)] if x.ndim > 2 else [1, 0]
        return x.permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])
    if layout == "gaps":
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    return x


def make(shape, dtype, what, layout=""):
    """Arguments: `what` names the terms (plain, gated, fp8) / the norm and what follows it."""
    *rows, C = shape
    words, num_terms = what.replace("/", "").split(), len(what.split("/")[0].split())
    x = lay_out(draw(*shape, seed=0), layout).to(DEVICE, dtype)
    cuts, cut_scales, gates, factors = [], [], [], []
    for seed, word in enumerate(words[:num_terms], 1):
        cut, is_fp8 = draw(*shape, seed=seed) * 3, "fp8" in word
        cuts.append(lay_out(cut, layout).to(DEVICE, FP8 if is_fp8 else dtype))
        cut_scales.append(draw(*rows, 1, seed=seed + 9).abs().to(DEVICE) if is_fp8 else None)
        gate = draw(rows[0], *[1] * (len(rows) - 1), C, seed=seed + 5).to(DEVICE, dtype)
        gates.append(gate if "gated" in word else None)
        factors.append(-0.5 if "half" in word else 1.0)
    given = {"norm": next(norm for norm in ("layer", "rms", "none") if norm in words), "eps": 1e-5}
    for seed, name in enumerate(("weight", "bias"), 20):
        given[name] = draw(C, seed=seed).to(DEVICE, dtype) if name in words else None
    for seed, name in enumerate(("scale", "shift"), 30):
        row = draw(*[1] * (len(rows) - 1), rows[-1], 2 * C, seed=seed)[..., C:]
        given[name] = row.to(DEVICE, dtype) if name in words else None
    given["offset"] = 0.0 if "product" in words else 1.0
    given |= {"y_dtype": dtype if cuts else None, "n_dtype": None if "y" in words else dtype}
    return (x, cuts, cut_scales, gates, factors), given


def define(terms, given, dtype):
    """By PyTorch's ops in a dtype, as a model has them."""
    x, *parts = terms
    y, C = x.to(dtype), x.shape[-1:]
    for cut, cut_scale, gate, factor in zip(*parts, strict=True):
        if cut_scale is not None:
            wide = torch.promote_types(dtype, torch.float32)
            cut = cut.to(wide) * cut_scale.to(wide)
        term = cut.to(dtype) * factor
        y = y + (term if gate is None else gate.to(dtype) * term)
    weight, bias, scale, shift = (
        None if given[name] is None else given[name].to(dtype)
        for name in ("weight", "bias", "scale", "shift")
    )
    n = y
    if given["norm"] == "layer":
        n = layer_norm(y, C, weight, bias, given["eps"])
    elif given["norm"] == "rms":
        n = rms_norm(y, C, weight, given["eps"])
        n = n if bias is None else n + bias
    n = n if scale is None else n * (given["offset"] + scale)
    n = n if shift is None else n + shift
    return [out for out, name in ((y, "y_dtype"), (n, "n_dtype")) if given[name] is not None]
