"""Renders clips of handwritten digits that move on a canvas, and the captions that describe them.

The digits are scikit-learn's `load_digits` (1797 images of 8x8 pixels from the test set of UCI's
"Optical Recognition of Handwritten Digits"). Every third image is held out: the video model is not
trained on it, and the judge is fitted on it.

Shapes: N clips, F frames, H = W = 16 pixels.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
import torch.nn.functional as F

from pabc.demo.text import CaptionError, split_words

Direction = Literal["left", "right", "up", "down"]
Speed = Literal["slow", "fast"]
Shade = Literal["bold", "plain", "faint"]
Split = Literal["train", "held-out"]
Word = TypeVar("Word", bound=str)

FRAMES = 8
CANVAS = 16
NATIVE = 8

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SPEEDS: tuple[Speed, ...] = get_args(Speed)
SHADES: tuple[Shade, ...] = get_args(Shade)

VELOCITY = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
"""Direction -> (y, x) unit vector, y pointing down."""
PIXELS_PER_FRAME = {"slow": 0.5, "fast": 1.0}
GAIN = {"bold": 1.5, "plain": 1.0, "faint": 0.6}

_SYNONYMS = {
    **{word: word for word in (*DIGITS, *DIRECTIONS, *SPEEDS, *SHADES)},
    **{str(value): word for value, word in enumerate(DIGITS)},
    **{"leftward": "left", "rightward": "right", "upward": "up", "downward": "down"},
    **{"slowly": "slow", "quickly": "fast"},
}
_FILLERS = ("a", "the", "digit", "moving", "sliding", "drifting")
WORDS = (*_FILLERS, *_SYNONYMS)
"""All words that a caption may contain, in the order of the vocabulary."""

_TEMPLATES = (
    "a {shade} {digit} moving {direction}, {speed}",
    "a {shade} {digit} sliding {direction}, {speed}",
    "a {speed} {shade} {digit} drifting {direction}",
    "the digit {digit}, {shade}, {speed}, moving {direction}",
)

PROMPTS = (
    "a bold seven moving left, fast",
    "a three moving up, slow",
    "a faint zero sliding right, slow",
    "a bold four moving down, fast",
    "a slow bold eight drifting left",
    "a two moving right, fast",
    "the digit 6, bold, slowly, moving upward",
    "a bold five sliding down, slow",
    "a fast nine drifting up",
    "a bold one moving right, fast",
)


@dataclass(frozen=True, slots=True)
class Caption:
    """The meaning of a caption."""

    digit: int
    direction: Direction
    speed: Speed = "slow"
    shade: Shade = "plain"

    def __str__(self) -> str:
        return self.phrase(0)

    def phrase(self, template: int) -> str:
        """Returns the caption in words, by one of the templates (taken modulo their number)."""
        shade = "" if self.shade == "plain" else self.shade
        text = _TEMPLATES[template % len(_TEMPLATES)].format(
            shade=shade, digit=DIGITS[self.digit], direction=self.direction, speed=self.speed
        )
        return " ".join(text.replace(", ,", ",").split())


def parse(caption: str) -> Caption:
    """Returns the meaning of a caption; the default speed is slow, the default shade plain.

    Raises CaptionError unless it has exactly one digit and one direction, and only known words.
    """
    words = split_words(caption)
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise CaptionError(
            f"caption {caption!r}: expected words among {', '.join(WORDS)}; found {unknown}"
        )
    meanings = [_SYNONYMS[word] for word in words if word in _SYNONYMS]
    return Caption(
        digit=DIGITS.index(_find_one(caption, "digit", DIGITS, meanings)),
        direction=_find_one(caption, "direction", DIRECTIONS, meanings),
        speed=_find_one(caption, "speed", SPEEDS, meanings, default="slow"),
        shade=_find_one(caption, "shade", SHADES, meanings, default="plain"),
    )


def _find_one(
    caption: str,
    kind: str,
    allowed: tuple[Word, ...],
    meanings: list[str],
    default: Word | None = None,
) -> Word:
    found = [word for word in allowed for meaning in meanings if word == meaning]
    if not found and default is not None:
        return default
    if len(found) != 1:
        raise CaptionError(
            f"caption {caption!r}: expected one {kind} of {', '.join(allowed)};"
            f" found {', '.join(found) or 'none'}"
        )
    return found[0]


def all_captions() -> tuple[Caption, ...]:
    """Returns the 240 different meanings: digit x direction x speed x shade."""
    return tuple(
        Caption(*parts) for parts in itertools.product(range(10), DIRECTIONS, SPEEDS, SHADES)
    )


def shuffled_captions(num: int, seed: int = 0) -> list[Caption]:
    """Returns `num` captions in random order; none of the 240 repeats before all have occurred."""
    rounds = -(-num // len(all_captions()))
    rng = random.Random(seed)
    return [c for _ in range(rounds) for c in rng.sample(all_captions(), len(all_captions()))][:num]


def load_digits(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images (N, 8, 8) in [0, 1] and labels (N,) of one split. Needs scikit-learn."""
    try:
        from sklearn.datasets import load_digits as load_bundle
    except ImportError as error:
        raise ImportError(
            "digits: expected scikit-learn, found none; pip install 'pabc[demo]'"
        ) from error
    if split not in get_args(Split):
        raise ValueError(f"split: expected one of {get_args(Split)}, found {split!r}")
    bundle = load_bundle()
    held_out = torch.arange(len(bundle.target)) % 3 == 0
    keep = held_out if split == "held-out" else ~held_out
    images = torch.from_numpy(bundle.images).float() / 16
    return images[keep], torch.from_numpy(bundle.target)[keep]


def render(
    images: torch.Tensor,
    start: torch.Tensor,
    velocity: torch.Tensor,
    gain: torch.Tensor,
    frames: int = FRAMES,
) -> torch.Tensor:
    """Returns clips (N, F, 16, 16) in [0, 1] of `images` (N, 8, 8) moving in a straight line.

    Args:
        images: the digits, in [0, 1].
        start: the (y, x) pixel of each image's corner in frame 0, (N, 2).
        velocity: pixels per frame, (N, 2); positions between pixels are interpolated bicubically.
        gain: the factor on the ink, (N,).
        frames: F.
    """
    num = images.shape[0]
    corner = start[:, None] + velocity[:, None] * torch.arange(frames)[None, :, None]
    pixel = torch.arange(CANVAS) + 0.5
    y = (pixel - corner[..., 0, None]) * (2 / NATIVE) - 1
    x = (pixel - corner[..., 1, None]) * (2 / NATIVE) - 1
    shape = (num, frames, CANVAS, CANVAS)
    grid = torch.stack([x[..., None, :].expand(shape), y[..., :, None].expand(shape)], dim=-1)
    source = images[:, None].expand(-1, frames, -1, -1).reshape(num * frames, 1, NATIVE, NATIVE)
    ink = F.grid_sample(
        source, grid.flatten(0, 1), mode="bicubic", padding_mode="zeros", align_corners=False
    )
    return (ink.view(shape) * gain[:, None, None, None]).clamp(0, 1)


def draw_clips(
    captions: list[Caption], generator: torch.Generator, split: Split = "train"
) -> torch.Tensor:
    """Returns rendered clips (N, F, 16, 16) in [0, 1], one per caption, on random tracks."""
    images, labels = load_digits(split)
    picks = [_pick(labels, caption.digit, generator) for caption in captions]
    return render_captions(images[picks], captions, generator)


def _pick(labels: torch.Tensor, digit: int, generator: torch.Generator) -> int:
    indices = (labels == digit).nonzero().flatten()
    return int(indices[torch.randint(len(indices), (), generator=generator)])


def render_captions(
    images: torch.Tensor,
    captions: list[Caption],
    generator: torch.Generator,
    only: torch.Tensor | None = None,
) -> torch.Tensor:
    """Renders each caption's motion and shade, with the digit inside the canvas in every frame.

    `only` (N,) selects one frame of each clip: the result is then (N, 1, 16, 16).
    """
    unit = torch.tensor([VELOCITY[caption.direction] for caption in captions])
    speed = torch.tensor([PIXELS_PER_FRAME[caption.speed] for caption in captions])
    gain = torch.tensor([GAIN[caption.shade] for caption in captions])
    velocity = unit * speed[:, None]
    room = CANVAS - NATIVE
    travel = velocity * (FRAMES - 1)
    free = torch.rand(len(captions), 2, generator=generator)
    along = free * (room - travel.abs()) + (-travel).clamp(min=0)
    across = room / 4 + free * room / 2
    start = torch.where(unit.abs() > 0, along, across)
    if only is None:
        return render(images, start, velocity, gain)
    return render(images, start + velocity * only[:, None], velocity, gain, frames=1)


def random_captions(labels: torch.Tensor, rng: random.Random) -> list[Caption]:
    """Returns a caption for each label (N,), its other words drawn uniformly."""
    return [
        Caption(digit, rng.choice(DIRECTIONS), rng.choice(SPEEDS), rng.choice(SHADES))
        for digit in labels.tolist()
    ]


def rephrase(caption: Caption, rng: random.Random) -> str:
    """Returns the caption by a random template, about half of its words replaced by synonyms."""
    words = split_words(caption.phrase(rng.randrange(len(_TEMPLATES))))
    return " ".join(
        rng.choice(_SYNONYM_LISTS[word]) if word in _SYNONYM_LISTS else word for word in words
    )


_SYNONYM_LISTS = {
    word: [word] * math.ceil(sum(v == word for v in _SYNONYMS.values()) - 1)
    + [other for other, meaning in _SYNONYMS.items() if meaning == word and other != word]
    for word in (*DIGITS, *DIRECTIONS, *SPEEDS)
}
