"""The demo's captions, digit clips, judge, model and sampler."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")

from pabc.demo import digits, judge, latte


@pytest.fixture(scope="module")
def referee() -> judge.Judge:
    return judge.Judge()


@pytest.fixture(scope="module")
def model() -> latte.Digits:
    return latte.load()


def test_every_phrase_parses_back_to_its_caption() -> None:
    rng = random.Random(0)
    captions = digits.all_captions()
    assert len(set(captions)) == 240
    for caption in captions:
        assert all(digits.parse(caption.phrase(template)) == caption for template in range(4))
        assert digits.parse(digits.rephrase(caption, rng)) == caption


def test_shuffled_captions_hold_each_meaning_once_a_round() -> None:
    captions = digits.shuffled_captions(300, seed=1)
    assert len(captions) == 300
    assert set(captions[:240]) == set(digits.all_captions())


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a purple seven moving left", r"found \['purple'\]"),
        ("a digit moving left", "expected one digit"),
        ("a seven nine moving left", "expected one digit"),
        ("a bold seven", "expected one direction"),
    ],
)
def test_parse_names_what_is_wrong(caption: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digits.parse(caption)


def test_splits_share_no_digit() -> None:
    train, held_out = digits.load_digits("train")[0], digits.load_digits("held-out")[0]
    assert len(train) == 1198
    assert len(held_out) == 599
    assert torch.cdist(train.flatten(1), held_out.flatten(1)).min() > 0


def test_clips_keep_the_digit_on_the_canvas() -> None:
    image = torch.ones(240, digits.NATIVE, digits.NATIVE)
    clips = digits.render_captions(
        image, list(digits.all_captions()), torch.Generator().manual_seed(0)
    )
    assert clips.shape == (240, 8, 16, 16)
    assert clips.min() >= 0
    assert clips.max() <= 1
    ink = clips.sum((2, 3))
    assert torch.allclose(ink, ink[:, :1].expand_as(ink), rtol=0.1)


def test_judge_reads_real_clips(referee: judge.Judge) -> None:
    """Measured on all 1198: digits 98.2 %, directions 100 %."""
    images, labels = digits.load_digits("train")
    captions = digits.random_captions(labels, random.Random(1))
    clips = digits.render_captions(images, captions, torch.Generator().manual_seed(5))
    score = referee.accuracy(clips, [str(caption) for caption in captions])
    assert score["digit"] > 0.97
    assert score["direction"] > 0.995


def test_judge_sees_no_direction_in_noise(referee: judge.Judge) -> None:
    noise = torch.rand(20, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    assert referee.read(noise)[1] == [None] * 20


def test_psnr_and_ssim_of_known_clips() -> None:
    clip = torch.rand(2, 8, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.9
    assert torch.allclose(judge.ssim(clip, clip), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(
        judge.psnr(clip, clip + 0.1), torch.full((2,), 20.0, dtype=torch.float64), atol=1e-4
    )
    assert judge.psnr(clip, clip).isinf().all()
    assert (judge.ssim(clip, 0.9 - clip) < 0).all()


def test_text_pads_captions_and_refuses_unknown_words(model: latte.Digits) -> None:
    tokens = model.text.tokenize(["a bold seven moving left, fast", ""])
    assert tokens.shape == (2, latte.MAX_TOKENS)
    assert (tokens[0] > 0).sum() == 6
    assert (tokens[1] == 0).all()
    assert model.text.encode(["a seven moving left"]).shape == (1, latte.MAX_TOKENS, latte.TEXT_DIM)
    with pytest.raises(ValueError, match=r"found \['zebra'\]"):
        model.text.encode(["a zebra moving left"])
    with pytest.raises(ValueError, match="at most 12 words, found 13"):
        model.text.encode(["a " * 13])


def test_load_names_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"transformer/config\.json"):
        latte.load(tmp_path)


def test_save_then_load_keeps_the_weights(tmp_path: Path) -> None:
    fresh = latte.build()
    fresh.save(tmp_path)
    again = latte.load(tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(fresh.transformer.parameters(), again.transformer.parameters(), strict=True)
    )
    assert torch.equal(fresh.text.encode(["a seven"]), again.text.encode(["a seven"]))


def test_replacement_sees_a_doubled_batch_and_the_announced_timesteps(model: latte.Digits) -> None:
    seen: list[int] = []

    def replacement(
        *,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool,
    ) -> tuple[torch.Tensor]:
        assert hidden_states.shape == (4, 1, 8, 16, 16)
        assert timestep.shape == (4,)
        assert return_dict is False
        assert encoder_hidden_states.shape == (4, latte.MAX_TOKENS, latte.TEXT_DIM)
        seen.append(int(timestep[0]))
        return (torch.zeros_like(hidden_states),)

    done: list[tuple[int, int]] = []
    clips = model.generate(
        replacement,
        list(digits.PROMPTS[:2]),
        model.noise(0, 2),
        num_steps=7,
        progress=lambda i, n: done.append((i, n)),
    )
    assert tuple(seen) == model.timesteps(7)
    assert done[-1] == (7, 7)
    assert clips.shape == (2, 1, 8, 16, 16)


def test_noise_of_a_clip_depends_on_seed_and_place_alone(model: latte.Digits) -> None:
    assert torch.equal(model.noise(1, 3)[:2], model.noise(1, 2))
    assert not torch.equal(model.noise(1, 1), model.noise(2, 1))


def test_sampling_is_deterministic(model: latte.Digits) -> None:
    first, second = (
        model.generate(None, list(digits.PROMPTS[:2]), model.noise(5, 2), num_steps=4)
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.min() >= -1
    assert first.max() <= 1


def test_generated_clips_show_what_the_captions_say(model: latte.Digits) -> None:
    """Measured: digits 90 % of these 20, directions 100 %; of 240 at 50 steps 97 %, 100 %."""
    captions = model.prompts(7, 20)
    clips = model.generate(None, captions, model.noise(7, 20), num_steps=20)
    score = model.judge(clips, captions)
    assert score["digit"] >= 0.8
    assert score["direction"] >= 0.9
