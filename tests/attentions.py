"""What tests of the attention kernels share: inputs, the definition, the allowed error."""

import itertools

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(shape, dtype, layout="packed", seed=0):
    """q, k, v of (N, H, T, S, D), as views of packed projections, or with gaps."""
    N, H, T, S, D = shape
    g = torch.Generator().manual_seed(seed)
    if layout == "packed":
        q = torch.randn(N, T, H, D, generator=g).transpose(1, 2)
        k, v = torch.randn(N, S, 2, H, D, generator=g).permute(2, 0, 3, 1, 4)
    else:
        q = torch.randn(N, H, D, T, generator=g).mT
        k = torch.randn(N, H, S, D + 3, generator=g)[..., :D]
        v = torch.randn(H, N, 2 * S, D, generator=g)[:, :, ::2].transpose(0, 1)
    return tuple(x.to(DEVICE, dtype) for x in (q, k, v))


def make_mask(shape, dtype, what, seed=1):
    """Of bools, with a row that leaves no key; to be added; or None."""
    N, H, T, S, _ = shape
    g = torch.Generator().manual_seed(seed)
    if "bool" in what:
        mask = torch.rand(N, 1, T, S, generator=g) < 0.6
        mask[0, 0, 0] = False
        return mask.to(DEVICE)
    if "keys" in what:
        return (torch.rand(N, 1, 1, S, generator=g) < 0.6).to(DEVICE)
    if "added" in what:
        return torch.randn(1, H, T, S, generator=g).to(DEVICE, dtype)
    return None


def make_lengths(shape, what, seed=2):
    """How many keys of each row take part, one of them none; or None."""
    N, _, _, S, _ = shape
    if "lengths" not in what:
        return None
    found = torch.randint(1, S + 1, (N,), generator=torch.Generator().manual_seed(seed))
    found[-1] = 0
    return found.to(DEVICE)


def define(q, k, v, mask=None, lengths=None):
    """By the definition, in the dtype that comes in; 0 where no key takes part."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.to(q.dtype)
    if lengths is not None:
        beyond = torch.arange(k.shape[2], device=k.device) >= lengths[:, None, None, None]
        scores = scores.masked_fill(beyond, float("-inf"))
    return scores.softmax(-1).nan_to_num(0) @ v


def check_kernel(kernel, reference, shape, what):
    """A kernel of (q, k, v, mask, lengths): at most twice the error of PyTorch's ops."""
    for dtype, layout in itertools.product((torch.float32, torch.bfloat16), ("packed", "gaps")):
        inputs = make(shape, dtype, layout)
        mask, lengths = make_mask(shape, dtype, what), make_lengths(shape, what)
        expected, same = (
            define(*(x.to(d) for x in inputs), mask, lengths) for d in (torch.float64, dtype)
        )
        found = [call(*inputs, mask, lengths) for call in (kernel, reference)]
        assert found[0].dtype == dtype and found[0].stride() == found[1].stride()
        allowed, *errors = ((x.double() - expected).abs().max() for x in (same, *found))
        assert max(errors) <= 2 * allowed + 1e-6, (dtype, layout, allowed, errors)


def check_writes(kernel, module, shape, monkeypatch):
    """Every element is written, and nothing beside it."""
    inputs = make(shape, torch.float32)
    expected = kernel(*inputs)
    buffers = []

    def allocate(q):
        N, H, T, D = q.shape
        buffers.append(torch.full((N + 2, T, H, D), float("nan"), device=DEVICE))
        return buffers[-1][1:-1].transpose(1, 2)

    monkeypatch.setattr(module, "allocate", allocate)
    assert torch.equal(kernel(*inputs), expected)
    assert buffers[0][0].isnan().all() and buffers[0][-1].isnan().all()
