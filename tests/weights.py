"""Weights that change: a LoRA adapter, and weights quantized in two ways."""

import torch
from torch import nn


class Lora(nn.Module):
    """A LoRA adapter around a linear layer, whose weight it shows as its own."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        self.scaling = {"default": 1.0}

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x)) * self.scaling["default"]


def add_adapter(model):
    attn = model.blocks[0].attn
    torch.manual_seed(7)
    attn.to_q = Lora(attn.to_q).eval()


def quantize(linear):
    """Bytes and a scale per row."""
    weight = linear.weight.detach()
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer that unpacks its weight at each call."""

    def __init__(self, linear):
        super().__init__()
        values, scale = quantize(linear)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.values.to(x.dtype) * self.scale, self.bias)


class Int8Tensor(torch.Tensor):
    """A weight made of two tensors, as torchao's are."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, outer_size, outer_stride):
        return cls(inner["values"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values.detach(), args[0].scale.detach())
        unpacked = [x.values * x.scale if isinstance(x, cls) else x for x in args]
        return func(*unpacked, **(kwargs or {}))


def with_int8_tensor(linear):
    linear.weight = nn.Parameter(Int8Tensor(*quantize(linear)), requires_grad=False)
    return linear
