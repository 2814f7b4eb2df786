"""The demo's models behind one interface: captions, noise, schedulers, judges and pictures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")
pytest.importorskip("tqdm")

import diffusers

from pabc.__main__ import main
from pabc.demo import models, nearest, sd3
from pabc.demo.emoji import PLACES, Caption, Pictures
from pabc.demo.files import FILES
from pabc.demo.model import Model
from pabc.demo.text import CaptionError

VARIANTS = ("full", "torch.compile", "3 steps", "2 steps", "pabc, no reuse", "pabc joint 2")

DIFFUSION = {
    "DPM-Solver++ 2M": diffusers.DPMSolverMultistepScheduler,
    "UniPC": diffusers.UniPCMultistepScheduler,
    "DEIS": diffusers.DEISMultistepScheduler,
    "Euler": diffusers.EulerDiscreteScheduler,
}
FLOW = {
    "Heun": (diffusers.FlowMatchHeunDiscreteScheduler, {"shift": 3.0}),
    "DPM-Solver++ 2M": (
        diffusers.DPMSolverMultistepScheduler,
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
    "UniPC": (
        diffusers.UniPCMultistepScheduler,
        {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    ),
}


@pytest.fixture(scope="module", params=models.MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return models.load(request.param)


@pytest.fixture(scope="module")
def emoji() -> sd3.Emoji:
    return sd3.load()


@pytest.fixture(scope="module")
def known() -> Pictures:
    return Pictures.load()


def test_unknown_models_are_named() -> None:
    with pytest.raises(ValueError, match="model: expected one of digits, emoji, found 'letters'"):
        models.load("letters")


def test_prompts_are_known_and_depend_on_the_seed(model: Model) -> None:
    prompts = model.prompts(0, 30)
    assert len(set(prompts)) == 30
    assert prompts == model.prompts(0, 30) != model.prompts(1, 30)
    for prompt in (*prompts, *model.examples):
        model.check_prompt(prompt)


def test_the_model_is_called_with_a_doubled_batch(model: Model) -> None:
    prompts, noise = list(model.examples[:2]), model.noise(0, 2)
    inputs: list[dict[str, Any]] = []

    def record(**arguments: Any) -> Any:
        inputs.append(arguments)
        return model.transformer(**arguments)

    samples = model.generate(record, prompts, noise, num_steps=3)
    assert torch.equal(samples, model.generate(None, prompts, noise, num_steps=3))
    assert [float(call["timestep"][0]) for call in inputs] == list(model.timesteps(3))
    for call in inputs:
        assert call["hidden_states"].shape == (4, *model.shape)
        assert torch.equal(*call["hidden_states"].chunk(2))
        assert call["return_dict"] is False
    unconditional = model.conditions(["", ""])
    for name, value in model.conditions(prompts).items():
        assert torch.equal(inputs[0][name], value)
        assert torch.equal(value[:2], unconditional[name][:2])
        assert not torch.equal(value[:2], value[2:])


def test_guidance_is_a_scale(model: Model) -> None:
    """Without guidance, what the model makes of the null caption is of no account."""
    prompts, noise = list(model.examples[:1]), model.noise(0, 1)

    def spoil(**arguments: Any) -> tuple[torch.Tensor]:
        output = model.transformer(**arguments)[0]
        return (torch.cat([output[:1] + 1, output[1:]]),)

    plain, spoiled = (
        [model.generate(fn, prompts, noise, num_steps=2, guidance=scale) for scale in (1.0, 2.0)]
        for fn in (None, spoil)
    )
    assert torch.allclose(plain[0], spoiled[0], atol=1e-5)
    assert not torch.allclose(plain[1], spoiled[1], atol=1e-2)


@pytest.mark.parametrize("name", DIFFUSION)
def test_other_schedulers_sample_digits(name: str) -> None:
    digits = models.load("digits")
    scheduler = DIFFUSION[name].from_config(digits.scheduler.config)
    check_scheduler(digits, scheduler, calls=6)


@pytest.mark.parametrize("name", FLOW)
def test_other_schedulers_sample_emoji(emoji: sd3.Emoji, name: str) -> None:
    make, options = FLOW[name]
    check_scheduler(emoji, make(**options), calls=11 if name == "Heun" else 6)


def check_scheduler(model: Model, scheduler: Any, calls: int) -> None:
    """Asserts that few steps of `scheduler` end near those of the model's own."""
    prompts, noise = list(model.examples[:1]), model.noise(0, 1)
    done: list[tuple[int, int]] = []
    samples = model.generate(
        None,
        prompts,
        noise,
        scheduler=scheduler,
        num_steps=6,
        progress=lambda *counts: done.append(counts),
    )
    expected = model.generate(None, prompts, noise, num_steps=12)
    assert done[-1] == (calls, calls)
    assert samples.shape == expected.shape
    assert (samples - expected).square().mean() < 0.5 * (expected - noise).square().mean()


def test_a_scheduler_is_new_each_time(model: Model) -> None:
    first = model.scheduler
    first.set_timesteps(3)
    assert model.scheduler is not first
    assert len(model.scheduler.timesteps) != 3


def test_bad_prompts_and_noise_are_named(model: Model) -> None:
    with pytest.raises(ValueError, match="prompts: expected at least one caption, found none"):
        model.generate(None, [], torch.zeros(0, *model.shape))
    with pytest.raises(ValueError, match=r"noise: expected shape \(1, .*, found \(2, "):
        model.generate(None, list(model.examples[:1]), model.noise(0, 2))
    with pytest.raises(CaptionError, match=r"found \['xylophones'\]"):
        model.generate(None, ["xylophones"], model.noise(0, 1))


def test_pictures_are_bytes_in_color(model: Model) -> None:
    frames = model.pictures(torch.stack([torch.full(model.shape, v) for v in (-1.0, 0.0, 1.0)]))
    assert frames.shape[0] == 3 and frames.shape[-1] == 3 and frames.ndim == 5
    assert [frames[i].unique().tolist() for i in range(3)] == [[0], [128], [255]]


def test_every_phrase_parses_back_to_its_caption(known: Pictures) -> None:
    rng = random.Random(0)
    for picture in range(len(known.images)):
        for mirrored in (False, True):
            for place in PLACES:
                caption = Caption(picture, mirrored, place)
                assert known.parse(known.phrase(caption)) == caption
                assert known.parse(known.phrase(caption, rng)) == caption


def test_every_name_is_that_of_one_picture(known: Pictures) -> None:
    for index, names in enumerate(known.names):
        assert [known.parse(name).picture for name in names] == [index] * len(names)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a cat on the left at the top", "one place at most; found cat"),
        ("mirrored", "found no name"),
        ("a cat dog", "expected the name of one picture, such as"),
    ],
)
def test_parse_names_what_is_wrong(known: Pictures, caption: str, message: str) -> None:
    with pytest.raises(CaptionError, match=message):
        known.parse(caption)


def test_pictures_are_moved_and_mirrored(known: Pictures) -> None:
    plain, mirrored, left, top = known.render(
        [Caption(5), Caption(5, True), Caption(5, False, "left"), Caption(5, True, "top")]
    )
    assert torch.equal(mirrored, plain.flip(-1))
    assert torch.equal(left[..., :-4], plain[..., 4:])
    assert (left[..., -4:] == 1).all()
    assert torch.equal(top[:, :-4], mirrored[:, 4:])
    assert plain.min() >= -1 and plain.max() <= 1


def test_the_judge_finds_the_nearest_picture(known: Pictures) -> None:
    captions = known.shuffle(3, 12)
    pictures = known.render(captions)
    noise = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    assert nearest.accuracy(known, pictures + 0.1 * noise, captions) == {
        "picture": 1.0,
        "placement": 1.0,
    }
    others = [Caption((each.picture + 1) % 298, each.mirrored, each.place) for each in captions]
    assert nearest.accuracy(known, pictures, others)["picture"] == 0
    cat = [known.parse("cat"), known.parse("mirrored cat")]
    found = nearest.accuracy(known, known.render(cat)[[0, 0]], cat)
    assert found["placement"] == 0.5


def test_generated_pictures_are_those_of_the_captions(emoji: sd3.Emoji) -> None:
    """Measured on 96 captions: 100 %, 100 %, and 31.2 dB (worst 22.9) to the pictures."""
    prompts = emoji.prompts(7, 8)
    samples = emoji.generate(None, prompts, emoji.noise(7, 8))
    assert emoji.judge(samples, prompts) == {"picture": 1.0, "placement": 1.0}
    pictures = emoji.known.render([emoji.known.parse(prompt) for prompt in prompts])
    assert ((samples - pictures) / 2).square().mean() < 10**-2.5


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"transformer/config\.json, .*train_emoji\.py"):
        sd3.load(tmp_path)


def test_the_demo_runs_with_pictures(tmp_path: Path) -> None:
    options = ["--model", "emoji", "--steps", "4", "--clips", "2", "--repeats", "1"]
    options += ["--backend", "eager", "--out", str(tmp_path), "--prompts", "a cat", "a taco"]
    assert main(["demo", *options]) == 0
    content = json.loads((tmp_path / "metrics.json").read_text())
    calibrated = ("calibrated 1.5x", "calibrated 2x")
    assert tuple(content["variants"]) == (*VARIANTS, "skip 2x", *calibrated)
    assert content["guidance"] == sd3.Emoji.guidance
    for row in content["variants"].values():
        assert 0 <= row["picture_accuracy"] <= 1
        assert 0 <= row["placement_accuracy"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert sd3.Emoji.judged in page and "digit and direction" not in page
    assert "video" not in page and page.count("<img") == 2
    assert {path.name for path in tmp_path.iterdir()} == set(FILES) - {"clips.gif"}
