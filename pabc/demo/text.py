"""Turns captions into tokens and trained embeddings, one per word."""

from __future__ import annotations

import difflib
import re

import torch
from torch import nn

PAD = "<pad>"


class CaptionError(ValueError):
    """A caption that a model does not understand; the message says what was expected and found."""


def split_words(caption: str) -> list[str]:
    """Returns the words of a caption in lower case, without punctuation."""
    return re.findall(r"[a-z0-9]+", caption.lower())


class Text(nn.Module):
    """A tokenizer of words and its trained embedding table.

    Shapes: B captions, L = `max_tokens` tokens, `dim` channels.

    Args:
        words: the vocabulary; padding is added in front.
        dim: channels.
        max_tokens: the length that captions are padded to.
        ignored: words that become no token.
    """

    def __init__(
        self,
        words: tuple[str, ...],
        *,
        dim: int,
        max_tokens: int,
        ignored: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self.vocab = {word: index for index, word in enumerate((PAD, *words))}
        self.max_tokens, self.ignored = max_tokens, ignored
        self.embedding = nn.Embedding(len(self.vocab), dim)

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Returns token ids (B, L), padded; "" is the null caption.

        Raises CaptionError for unknown or too many words.
        """
        return torch.tensor([self._tokenize_one(caption) for caption in captions])

    def _tokenize_one(self, caption: str) -> list[int]:
        words = [word for word in split_words(caption) if word not in self.ignored]
        unknown = [word for word in words if word not in self.vocab]
        if unknown:
            known = difflib.get_close_matches(unknown[0], self.vocab, 5, 0)
            raise CaptionError(
                f"caption {caption!r}: expected words of the vocabulary, such as"
                f" {', '.join(known)}; found {unknown}"
            )
        if len(words) > self.max_tokens:
            raise CaptionError(
                f"caption {caption!r}: expected at most {self.max_tokens} words, found {len(words)}"
            )
        padding = [self.vocab[PAD]] * (self.max_tokens - len(words))
        return [self.vocab[word] for word in words] + padding

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Returns the embeddings (B, L, dim) of the captions, padding included."""
        return self.embedding(self.tokenize(captions).to(self.embedding.weight.device))

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the embeddings (B, L, dim) of tokens (B, L), and those pooled, (B, dim).

        Pooled are the words' embeddings, added up and divided by the root of their number.
        """
        embedded = self.embedding(tokens)
        is_word = (tokens != self.vocab[PAD]).unsqueeze(-1).to(embedded.dtype)
        return embedded, (embedded * is_word).sum(1) / is_word.sum(1).clamp(min=1).sqrt()
