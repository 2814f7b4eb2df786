"""Recognizes digit and direction in generated clips, and compares clips pixel by pixel.

A support vector machine, fitted on digits that the video model was not trained on, recognizes the
digit; the motion of the center of mass gives the direction.

Shapes: N clips, F frames, H = W = 16 pixels, values in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pabc.demo import digits
from pabc.demo.digits import CANVAS, DIRECTIONS, VELOCITY, Caption, Direction

WINDOW = 10
"""The side, in pixels, of the square around the center of mass that is classified."""
COPIES = 8
"""The number of renderings of each held-out digit that the classifier is fitted on."""
MIN_TRAVEL = 1.5
"""Pixels that the center of mass of a moving digit travels at least; a slow digit travels 3.5."""


def find_centers(clips: torch.Tensor) -> torch.Tensor:
    """Returns the center of mass of each frame, (N, F, 2), as (y, x) pixels."""
    ink = clips.clamp(min=0) + 1e-6
    pixels = torch.arange(CANVAS, dtype=clips.dtype)
    mass = ink.sum((2, 3))
    return torch.stack(
        [(ink.sum(3) * pixels).sum(2) / mass, (ink.sum(2) * pixels).sum(2) / mass], dim=-1
    )


def crop_digits(clips: torch.Tensor) -> torch.Tensor:
    """Returns the digit of each clip, (N, 10, 10), scaled to a maximum of 1.

    It is the mean over frames of a window around each frame's center of mass.
    """
    num, frames = clips.shape[:2]
    offsets = torch.arange(WINDOW) - (WINDOW - 1) / 2
    points = (find_centers(clips)[:, :, None] + offsets[:, None] + 0.5) * (2 / CANVAS) - 1
    y, x = points.flatten(0, 1).unbind(-1)
    shape = (num * frames, WINDOW, WINDOW)
    grid = torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], dim=-1)
    crops = F.grid_sample(
        clips.reshape(-1, 1, CANVAS, CANVAS), grid, mode="bicubic", align_corners=False
    )
    crops = crops.view(num, frames, WINDOW, WINDOW).mean(1).clamp(min=0)
    return crops / crops.amax((1, 2), keepdim=True).clamp(min=1e-6)


class Judge:
    """A classifier of digit and direction in clips. Needs scikit-learn; fitting takes seconds."""

    def __init__(self, seed: int = 0) -> None:
        try:
            from sklearn.svm import SVC
        except ImportError as error:
            raise ImportError(
                "judge: expected scikit-learn, found none; pip install 'pabc[demo]'"
            ) from error
        clips, labels = _render_held_out(seed)
        self._classifier = SVC(C=10, gamma="scale").fit(
            crop_digits(clips).flatten(1).numpy(), labels.numpy()
        )

    def read(self, clips: torch.Tensor) -> tuple[list[int], list[Direction | None]]:
        """Returns digit and direction of each of `clips` (N, F, H, W); None if nothing moves."""
        values = self._classifier.predict(crop_digits(clips).flatten(1).numpy())
        return values.tolist(), [_read_direction(path) for path in find_centers(clips)]

    def accuracy(self, clips: torch.Tensor, captions: list[str]) -> dict[str, float]:
        """Returns the shares of `clips` (N, F, H, W) that show their caption's digit, direction."""
        if len(captions) != len(clips):
            raise ValueError(
                f"captions: expected one per clip ({len(clips)}), found {len(captions)}"
            )
        wanted = [digits.parse(caption) for caption in captions]
        values, directions = self.read(clips)
        right_digit = [
            value == caption.digit for value, caption in zip(values, wanted, strict=True)
        ]
        right_way = [
            way == caption.direction for way, caption in zip(directions, wanted, strict=True)
        ]
        return {
            "digit": sum(right_digit) / len(wanted),
            "direction": sum(right_way) / len(wanted),
        }


def _render_held_out(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = digits.load_digits("held-out")
    images, labels = images.repeat(COPIES, 1, 1), labels.repeat(COPIES)
    generator = torch.Generator().manual_seed(seed)
    meanings = digits.all_captions()
    picks = torch.randint(len(meanings), (len(labels),), generator=generator).tolist()
    captions: list[Caption] = [meanings[pick] for pick in picks]
    return digits.render_captions(images, captions, generator), labels


def _read_direction(path: torch.Tensor) -> Direction | None:
    """Returns the direction of a line fitted to the centers (F, 2); None below MIN_TRAVEL."""
    time = torch.arange(len(path), dtype=path.dtype) - (len(path) - 1) / 2
    slope = (time[:, None] * path).sum(0) / (time * time).sum()
    scores = {way: float(slope @ torch.tensor(VELOCITY[way])) for way in DIRECTIONS}
    best = max(DIRECTIONS, key=lambda way: scores[way])
    return best if scores[best] * (len(path) - 1) >= MIN_TRAVEL else None


def psnr(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns the peak signal-to-noise ratio in dB, (N,), of samples (N, ...) in [0, 1].

    It is inf for equal samples.
    """
    error = (a.double() - b.double()).square().flatten(1).mean(1)
    return -10 * torch.log10(error)


def ssim(a: torch.Tensor, b: torch.Tensor, window: int = 11, sigma: float = 1.5) -> torch.Tensor:
    """Returns the structural similarity, (N,), of samples (N, ..., H, W) in [0, 1].

    It is the mean over all frames, colors and positions at which the window lies within the frame.
    Source: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", 2004: Gaussian window of 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03.
    """
    offsets = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = torch.outer(weights, weights)[None, None] / weights.sum() ** 2

    def blur(frames: torch.Tensor) -> torch.Tensor:
        return F.conv2d(frames.reshape(-1, 1, *frames.shape[-2:]), kernel)

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return similarity.reshape(len(a), -1).mean(1)
