"""Trains the demo's models: the checkpoints, optimizers, rates and averages that they share."""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

EMA_DECAY = 0.999
WARMUP_STEPS = 100
DECAY_FRACTION = 0.4


@dataclass(slots=True)
class Run:
    """One training run: the arguments, and the state that a checkpoint contains.

    `progress` is a dataclass of numbers.
    """

    args: argparse.Namespace
    trainee: nn.Module
    ema: nn.Module
    optimizers: list[torch.optim.Optimizer]
    progress: Any

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.args.out / "checkpoint.pt"

    @property
    def state(self) -> dict[str, Any]:
        """The content of a checkpoint."""
        return {
            "trainee": self.trainee.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": asdict(self.progress),
        }

    def save(self) -> None:
        """Writes the checkpoint."""
        write_checkpoint(self.path, self.state, self.args.piece_mib)

    def resume(self) -> None:
        """Restores the state from the checkpoint, if there is one and the arguments ask for it."""
        if not (self.args.resume and (self.path.is_file() or find_pieces(self.path))):
            return
        state = read_checkpoint(self.path)
        self.trainee.load_state_dict(state["trainee"])
        self.ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = type(self.progress)(**state["progress"])
        print(f"resumed {self.path}: {self.progress}", flush=True)


def write_checkpoint(path: Path, state: Any, piece_mib: float | None = None) -> None:
    """Writes a checkpoint to a file, atomically, or to pieces of it of at most so many MiB."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if piece_mib is None:
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        return
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content, size = buffer.getbuffer(), int(piece_mib * 2**20)
    for piece in find_pieces(path):
        piece.unlink()
    for index, start in enumerate(range(0, len(content), size)):
        path.with_name(f"{path.name}.{index}").write_bytes(content[start : start + size])


def find_pieces(path: Path) -> list[Path]:
    """Returns the pieces of a checkpoint that is not one file, in order."""
    found = path.parent.glob(f"{path.name}.*")
    return sorted(
        (piece for piece in found if piece.suffix[1:].isdecimal()),
        key=lambda piece: int(piece.suffix[1:]),
    )


def read_checkpoint(path: Path) -> Any:
    """Returns the state in a checkpoint, which is a file or pieces of one, on the CPU.

    What is loaded from it is moved to where it belongs: optimizers keep their counts on the CPU.
    """
    source: Any = path
    if not path.is_file() and (pieces := find_pieces(path)):
        source = io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
    return torch.load(source, map_location="cpu", weights_only=True)


def add_arguments(add: Callable[..., Any], out: Path) -> None:
    """Adds the arguments that all runs have; `add` is a parser's `add_argument`."""
    add("--out", type=Path, default=out, help=f"folder of the checkpoint ({out})")
    add("--export", type=Path, metavar="FOLDER", help="only write the checkpoint's weights there")
    add("--resume", action=argparse.BooleanOptionalAction, default=True)
    add("--compile", action=argparse.BooleanOptionalAction, default=True)
    add("--muon-lr", type=float, default=2e-3)
    add("--adamw-lr", type=float, default=1e-3)
    add("--device", default="cpu")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--log-every", type=int, default=50)
    add("--save-minutes", type=float, default=3.0)
    add("--piece-mib", type=float, help="split the checkpoint into files of at most this size")


def build_optimizers(
    trainee: nn.Module, muon_lr: float, adamw_lr: float
) -> list[torch.optim.Optimizer]:
    """Returns Muon for the blocks' matrices, and AdamW for all other parameters."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in trainee.named_parameters():
        is_matrix = parameter.ndim == 2 and "scale_shift" not in name
        (matrices if is_matrix and "blocks" in name else others).append(parameter)
    muon = torch.optim.Muon(matrices, muon_lr, 0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


def learning_rate_factor(done: float, step: int) -> float:
    """Returns the factor at progress `done` in [0, 1]: warm-up, constant, then linear to 0."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.01, min(1.0, (1 - done) / DECAY_FRACTION))


def take_step(
    trainee: nn.Module, optimizers: list[torch.optim.Optimizer], loss: torch.Tensor, factor: float
) -> None:
    """Steps the optimizers at `factor` times their learning rates."""
    loss.backward()
    nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def update_ema(ema: nn.Module, trainee: nn.Module, step: int) -> None:
    """Updates the moving average of the weights."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(trainee.parameters()), 1 - decay)
