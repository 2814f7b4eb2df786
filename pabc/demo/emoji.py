"""Describes and renders the pictures that the emoji model draws, and the captions that name them.

A caption names a picture and says whether it is mirrored and where it stands: "a cat",
"mirrored fire engine at the top". Pictures are 32x32 pixels on white.

Shapes: N pictures, C = 3 colors, H = W = 32 pixels.
"""

from __future__ import annotations

import difflib
import json
import random
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from pabc.demo.text import CaptionError, split_words

Place = Literal["center", "left", "right", "top", "bottom"]

SIZE = 32
SHIFT = 4
"""Pixels that a picture that is not in the center is moved by."""
PLACES: tuple[Place, ...] = get_args(Place)
WEIGHTS = Path(__file__).parent / "weights" / "emoji"

_PHRASES: dict[Place, tuple[str, ...]] = {
    "center": ("",),
    "left": ("on the left", "shifted left"),
    "right": ("on the right", "shifted right"),
    "top": ("at the top", "shifted up"),
    "bottom": ("at the bottom", "shifted down"),
}
_OFFSETS: dict[Place, tuple[int, int]] = {
    "center": (0, 0),
    "left": (0, -SHIFT),
    "right": (0, SHIFT),
    "top": (-SHIFT, 0),
    "bottom": (SHIFT, 0),
}
_PLACE_WORDS: dict[str, Place] = {
    "left": "left",
    "right": "right",
    "top": "top",
    "up": "top",
    "bottom": "bottom",
    "down": "bottom",
}
_MIRRORED = ("mirrored", "flipped")
_WORDS = frozenset(split_words("a an the on at of and with picture shifted"))
"""Words that say nothing about the picture or its place."""


@dataclass(frozen=True, slots=True)
class Caption:
    """The meaning of a caption: the index of a picture, and how it is placed."""

    picture: int
    mirrored: bool = False
    place: Place = "center"


class Pictures:
    """The pictures that the model knows, with their names and groups.

    `images` (N, 32, 32, 3) is uint8; `names` has the names of each picture, the first of them the
    usual one; `groups` has one word for each picture, such as "animal".
    """

    def __init__(self, images: np.ndarray, names: list[list[str]], groups: list[str]) -> None:
        self.images, self.names, self.groups = images, names, groups

    @classmethod
    def load(cls, folder: Path = WEIGHTS) -> Pictures:
        """Returns the pictures of `folder`, or of the package."""
        entries = json.loads((folder / "pictures.json").read_text())
        with np.load(folder / "pictures.npz") as file:
            images = file["images"]
        return cls(images, [entry["names"] for entry in entries], [e["group"] for e in entries])

    def save(self, folder: Path) -> None:
        """Writes the pictures to `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "pictures.npz", images=self.images)
        entries = [
            json.dumps({"names": names, "group": group})
            for names, group in zip(self.names, self.groups, strict=True)
        ]
        (folder / "pictures.json").write_text("[\n" + ",\n".join(entries) + "\n]\n")

    @cached_property
    def words(self) -> tuple[str, ...]:
        """All words that a caption may contain, sorted."""
        texts = ["a an picture of", *_MIRRORED, *self.groups]
        texts += [name for names in self.names for name in names]
        texts += [phrase for phrases in _PHRASES.values() for phrase in phrases]
        return tuple(sorted({word for text in texts for word in split_words(text)}))

    @cached_property
    def _by_words(self) -> dict[frozenset[str], int]:
        """The index of each picture by the words of each of its names, its group added or not."""
        found: dict[frozenset[str], int] = {}
        for index, (names, group) in enumerate(zip(self.names, self.groups, strict=True)):
            for name in names:
                words = _keep(split_words(name))
                found[frozenset(words)] = index
                found.setdefault(frozenset([*words, group]), index)
        return found

    def draw_caption(self, rng: random.Random) -> Caption:
        """Returns a random caption: half of them of the plain picture."""
        return _draw_placement(rng.randrange(len(self.images)), rng)

    def shuffle(self, seed: int, count: int) -> list[Caption]:
        """Returns random captions; no picture repeats before all have occurred."""
        rng = random.Random(seed)
        order: list[int] = []
        while len(order) < count:
            order += rng.sample(range(len(self.images)), len(self.images))
        return [_draw_placement(picture, rng) for picture in order[:count]]

    def parse(self, text: str) -> Caption:
        """Returns the meaning of a caption.

        Raises CaptionError unless it names one picture that is known, and one place at most.
        """
        words = _keep(split_words(text))
        places = {_PLACE_WORDS[word] for word in words if word in _PLACE_WORDS}
        name = frozenset(words).difference(_PLACE_WORDS, _MIRRORED)
        if name not in self._by_words or len(places) > 1:
            names = [each[0] for each in self.names]
            close = difflib.get_close_matches(" ".join(sorted(name)), names, 5, 0)
            raise CaptionError(
                f"caption {text!r}: expected the name of one picture, such as {', '.join(close)},"
                f" and one place at most; found {', '.join(sorted(name)) or 'no name'}"
            )
        mirrored = not set(_MIRRORED).isdisjoint(words)
        return Caption(self._by_words[name], mirrored, places.pop() if places else "center")

    def phrase(self, caption: Caption, rng: random.Random | None = None) -> str:
        """Returns `caption` in words: the plainest ones, or with `rng` any."""
        if rng is None:
            mirrored, name = _MIRRORED[0], self.names[caption.picture][0]
            place, form = _PHRASES[caption.place][0], "{}"
        else:
            mirrored, name = rng.choice(_MIRRORED), rng.choice(self.names[caption.picture])
            place = rng.choice(_PHRASES[caption.place])
            form = rng.choice(("{}", "a {}", "{group} {}", "{}, {group}", "picture of {}"))
        text = form.format(name, group=self.groups[caption.picture])
        words = (mirrored if caption.mirrored else "", text, place)
        return " ".join(word for word in words if word)

    def render(self, captions: list[Caption]) -> torch.Tensor:
        """Returns the pictures (N, 3, 32, 32) in [-1, 1]."""
        images = torch.from_numpy(self.images[[caption.picture for caption in captions]])
        plain = images.permute(0, 3, 1, 2).float() / 127.5 - 1
        return torch.stack(
            [_place(image, caption) for image, caption in zip(plain, captions, strict=True)]
        )


def _draw_placement(picture: int, rng: random.Random) -> Caption:
    if rng.random() < 0.5:
        return Caption(picture)
    return Caption(picture, rng.random() < 0.5, rng.choice(PLACES))


def _keep(words: list[str]) -> list[str]:
    return [word for word in words if word not in _WORDS]


def _place(image: torch.Tensor, caption: Caption) -> torch.Tensor:
    """Returns `image` (3, H, W) mirrored and moved as `caption` says, with white behind it."""
    if caption.mirrored:
        image = image.flip(-1)
    down, right = _OFFSETS[caption.place]
    pad = (max(right, 0), max(-right, 0), max(down, 0), max(-down, 0))
    padded = torch.nn.functional.pad(image, pad, value=1.0)
    top, left = max(-down, 0), max(-right, 0)
    return padded[:, top : top + SIZE, left : left + SIZE]
