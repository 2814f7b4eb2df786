"""LoRA adapters of a compiled pipeline, through diffusers and peft, against the plain pipeline."""

import warnings

import pytest
import torch
from loops import compile_eager
from pipelines import PIPELINES, make_wan

import pabc

pytest.importorskip("peft")
pytestmark = pytest.mark.runtime
WAN = next(pipeline for pipeline in PIPELINES if pipeline.name == "Wan")
WIDTH = 24


def weights(seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (rank, WIDTH), "B": (WIDTH, rank)}
    return {
        f"transformer.blocks.0.attn1.{layer}.lora_{part}.weight": 0.3
        * torch.randn(shape, generator=generator)
        for layer in ("to_q", "to_v")
        for part, shape in shapes.items()
    }


def run(pipe, **more):
    return WAN.run(pipe, num_steps=3, **more)


def load(pipe, seed=1, name="a", **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.load_lora_weights(weights(seed), adapter_name=name, **more)


def use_two(pipe):
    load(pipe)
    load(pipe, 9, "b")
    pipe.set_adapters(["a", "b"], [0.7, 0.4])


def fuse(pipe):
    load(pipe)
    pipe.fuse_lora(components=["transformer"], lora_scale=0.6)


def unfuse(pipe):
    fuse(pipe)
    run(pipe)
    pipe.unfuse_lora(components=["transformer"])


def swap(pipe):
    load(pipe)
    run(pipe)
    load(pipe, 21, hotswap=True)


def scale(pipe):
    load(pipe)
    run(pipe)
    pipe.set_adapters(["a"], [0.3])


def disable(pipe):
    load(pipe)
    run(pipe)
    pipe.disable_lora()


def delete(pipe):
    load(pipe)
    run(pipe)
    pipe.delete_adapters("a")


def unload(pipe):
    load(pipe)
    run(pipe)
    pipe.unload_lora_weights()


CASES = [load, scale, use_two, disable, delete, fuse, unfuse, swap, unload]


@pytest.mark.parametrize("change", CASES, ids=lambda change: change.__name__)
def test_adapters_follow_as_in_the_plain_pipeline(change):
    plain, pipe = make_wan(), make_wan()
    with compile_eager(pipe, pabc.Schedule.none) as fast:
        run(fast)
        for each in (plain, fast):
            change(each)
        assert pipe.get_list_adapters() == plain.get_list_adapters()
        torch.testing.assert_close(run(fast), run(plain), atol=1e-5, rtol=0)
    torch.testing.assert_close(run(pipe), run(plain), atol=0, rtol=0)


def test_a_scale_among_the_keywords_of_a_call():
    plain, pipe = make_wan(), make_wan()
    with compile_eager(pipe, pabc.Schedule.none) as fast:
        for each in (plain, fast):
            load(each)
        found = [run(fast, attention_kwargs={"scale": s}) for s in (0.5, 1.0, 0.5)]
        expected = [run(plain, attention_kwargs={"scale": s}) for s in (0.5, 1.0, 0.5)]
        assert all(map(torch.equal, found, expected)) and not torch.equal(found[0], found[1])
        captures = fast.models["transformer"].stats.captures
        assert captures == 2, "each scale has a program of its own, which is kept"
