"""Writes clips or pictures side by side, as an animated GIF and as a still picture.

Shapes: B prompts, F frames (1 of a picture), H = W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

FRAME_MILLISECONDS = 150
LAST_FRAME_MILLISECONDS = 600
_PAPER, _INK, _FAINT = (255, 255, 255), (24, 28, 35), (105, 112, 122)
_MARGIN, _GAP, _HEAD, _LINE, _TEXT = 10, 12, 40, 22, 13


@dataclass(frozen=True)
class Column:
    """One variant: a title, a smaller line below it, and its frames (B, F, H, W, 3) of uint8."""

    title: str
    note: str
    frames: torch.Tensor


def save_gif(path: Path, prompts: Sequence[str], columns: Sequence[Column], scale: int = 6) -> None:
    """Writes the clips as an animation: a row per prompt, a column per variant."""
    num_frames = columns[0].frames.shape[1]
    pages = [_draw_page(prompts, columns, (index,), scale) for index in range(num_frames)]
    pages = [page.quantize(64, dither=Image.Dither.NONE) for page in pages]
    durations = [FRAME_MILLISECONDS] * (num_frames - 1) + [LAST_FRAME_MILLISECONDS]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=durations, loop=0)


def save_still(
    path: Path, prompts: Sequence[str], columns: Sequence[Column], frames: int = 3, scale: int = 4
) -> None:
    """Writes a few frames of each clip, from its first to its last, as one picture."""
    last = columns[0].frames.shape[1] - 1
    picked = sorted({round(i * last / max(1, frames - 1)) for i in range(frames)})
    _draw_page(prompts, columns, tuple(picked), scale).save(path, optimize=True)


def _draw_page(
    prompts: Sequence[str], columns: Sequence[Column], frames: tuple[int, ...], scale: int
) -> Image.Image:
    height, width = (side * scale for side in columns[0].frames.shape[2:4])
    span = len(frames) * (width + 2) - 2
    row = _LINE + height + _GAP
    size = (
        2 * _MARGIN + len(columns) * (span + _GAP) - _GAP,
        2 * _MARGIN + _HEAD + len(prompts) * row - _GAP,
    )
    page = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(page)
    for i, column in enumerate(columns):
        left = _MARGIN + i * (span + _GAP)
        _write(draw, (left, _MARGIN), column.title, _INK, span)
        _write(draw, (left, _MARGIN + 17), column.note, _FAINT, span)
        for j in range(len(prompts)):
            top = _MARGIN + _HEAD + j * row + _LINE
            for k, frame in enumerate(frames):
                image = _draw_frame(column.frames[j, frame], scale)
                page.paste(image, (left + k * (width + 2), top))
    for j, prompt in enumerate(prompts):
        corner = (_MARGIN, _MARGIN + _HEAD + j * row + 2)
        _write(draw, corner, prompt, _INK, size[0] - 2 * _MARGIN)
    return page


def _draw_frame(frame: torch.Tensor, scale: int) -> Image.Image:
    image = Image.fromarray(frame.contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    text: str,
    color: tuple[int, int, int],
    width: int,
) -> None:
    """Draws a line of text, shortened to at most `width` pixels."""
    font = ImageFont.load_default(_TEXT)
    shown = text
    while shown and font.getlength(shown) > width:
        text = text[:-1]
        shown = f"{text}..."
    draw.text(corner, shown, fill=color, font=font)
