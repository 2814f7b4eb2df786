"""Shares what the training of the demo's models has in common: optimizers, rates and averages."""

from __future__ import annotations

import torch
from torch import nn

EMA_DECAY = 0.999
WARMUP_STEPS = 100
DECAY_FRACTION = 0.4


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
