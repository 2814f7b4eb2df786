"""diffusers' transformers at small sizes with random weights, and the kinds of their attentions.

Shapes: B batch, T frames, H x W latent pixels, N tokens, L text tokens, C channels.
"""

from . import audio, image, video
from .entry import Entry

ENTRIES: tuple[Entry, ...] = (*image.ENTRIES, *video.ENTRIES, *audio.ENTRIES)
