"""Train the demo's video model on one CPU or GPU, in two stages, and export its weights.

Stage 1 trains the spatial blocks on single frames; stage 2 trains all blocks on clips of 8 frames. Every draw of a step
follows from (seed, stage, step), so a resumed run goes on as it would have. With `--stage-steps` the learning rate
follows the steps and the run is repeatable; with `--stage-minutes` it follows the time spent.

    python bench/train_demo.py --out runs/demo --stage-minutes 30 60
    python bench/train_demo.py --out runs/demo --export pabc/demo/weights
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from pabc.demo import digits, latte

NULL_CAPTION = 0.12
EMA_DECAY = 0.999
WARMUP_STEPS = 100
DECAY_FRACTION = 0.4
TEMPORAL_OUTPUTS = ("attn1.to_out.0", "ff.net.2")


@dataclass(slots=True)
class Progress:
    """How far the run is: the stage (0 or 1) and, for each stage, its steps, seconds and samples."""

    stage: int = 0
    steps: list[int] = field(default_factory=lambda: [0, 0])
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])
    samples: list[int] = field(default_factory=lambda: [0, 0])


class Trainee(nn.Module):
    """The transformer and its text embedding, trained together to predict the velocity."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = latte.build_transformer()
        self.text = latte.Text()

    def forward(self, noisy: torch.Tensor, timestep: torch.Tensor, tokens: torch.Tensor, frame: torch.Tensor | None):
        """Velocity (N, 1, F, 16, 16). `frame` (N,), with F = 1, says where in its clip each single frame lies."""
        handle = None
        if frame is not None:
            row = self.transformer.temp_pos_embed[0, frame][:, None]
            first = self.transformer.transformer_blocks[0]
            handle = first.register_forward_hook(lambda _module, _args, output: output + row)
        text = self.text.embedding(tokens)
        (velocity,) = self.transformer(
            noisy, timestep, text, enable_temporal_attentions=frame is None, return_dict=False
        )
        if handle is not None:
            handle.remove()
        return velocity


def zero_temporal_outputs(trainee: Trainee) -> None:
    """Make every temporal block the identity, so that stage 2 starts from what stage 1 learned."""
    for block in trainee.transformer.temporal_transformer_blocks:
        for name in TEMPORAL_OUTPUTS:
            linear = block.get_submodule(name)
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)


def build_optimizers(trainee: Trainee, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for everything else."""
    matrices, others = [], []
    for name, parameter in trainee.named_parameters():
        is_matrix = "transformer_blocks" in name and parameter.ndim == 2 and "scale_shift" not in name
        (matrices if is_matrix else others).append(parameter)
    adamw = torch.optim.AdamW(others, lr=args.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0)
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]


def draw_batch(
    data: tuple[torch.Tensor, torch.Tensor], text: latte.Text, size: int, stage: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Clips (N, 1, F, 16, 16) in [-1, 1], tokens (N, 12), noise like the clips, timesteps (N,)."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    picks = torch.randint(len(images), (size,), generator=generator)
    captions = digits.random_captions(labels[picks], rng)
    frames = 1 if stage == 0 else digits.FRAMES
    clips = digits.render_captions(images[picks], captions, generator, frames)[:, None] * 2 - 1
    words = ["" if rng.random() < NULL_CAPTION else digits.rephrase(caption, rng) for caption in captions]
    noise = torch.randn(clips.shape, generator=generator)
    timesteps = ((torch.arange(size) + torch.rand(size, generator=generator)) * (1000 / size)).long()
    return clips, text.tokenize(words), noise, timesteps


def compute_loss(step_fn: Callable, batch: tuple[torch.Tensor, ...], alphas: torch.Tensor, stage: int) -> torch.Tensor:
    """Mean squared error of the velocity sqrt(a) noise - sqrt(1 - a) clip (Salimans and Ho, arXiv 2202.00512)."""
    clips, tokens, noise, timesteps = batch
    alpha = alphas[timesteps].view(-1, 1, 1, 1, 1)
    noisy = alpha.sqrt() * clips + (1 - alpha).sqrt() * noise
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clips
    frame = torch.arange(len(clips), device=clips.device) % digits.FRAMES if stage == 0 else None
    return F.mse_loss(step_fn(noisy, timesteps, tokens, frame), target)


def learning_rate_factor(done: float, step: int) -> float:
    """Linear warm-up, constant, then linear to zero over the last part; `done` is the stage's progress in [0, 1]."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(0.01, min(1.0, (1 - done) / DECAY_FRACTION))


def stage_done(progress: Progress, args: argparse.Namespace) -> float:
    """Progress of the present stage in [0, 1] by the steps or the minutes given for it."""
    stage = progress.stage
    if args.stage_steps:
        return min(1.0, progress.steps[stage] / max(1, args.stage_steps[stage]))
    return min(1.0, progress.seconds[stage] / max(1e-9, 60 * args.stage_minutes[stage]))


@torch.no_grad()
def update_ema(ema: Trainee, trainee: Trainee, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(trainee.parameters()), 1 - decay)


def save_checkpoint(path: Path, trainee: Trainee, ema: Trainee, optimizers: list, progress: Progress) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "trainee": trainee.state_dict(),
        "ema": ema.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": {name: getattr(progress, name) for name in Progress.__slots__},
    }
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    trainee, progress, path = Trainee().to(args.device), Progress(), args.out / "checkpoint.pt"
    ema = copy.deepcopy(trainee).requires_grad_(False)
    optimizers = build_optimizers(trainee, args)
    if args.resume and path.is_file():
        state = torch.load(path, map_location=args.device, weights_only=True)
        trainee.load_state_dict(state["trainee"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress = Progress(**state["progress"])
        print(f"resumed {path}: {progress}", flush=True)
    while progress.stage < 2:
        if progress.stage == 1 and progress.steps[1] == 0:
            trainee.load_state_dict(ema.state_dict())
            zero_temporal_outputs(trainee)
            ema.load_state_dict(trainee.state_dict())
            optimizers = build_optimizers(trainee, args)
        train_stage(args, trainee, ema, optimizers, progress, path)
        progress.stage += 1
        save_checkpoint(path, trainee, ema, optimizers, progress)


def train_stage(
    args: argparse.Namespace, trainee: Trainee, ema: Trainee, optimizers: list, progress: Progress, path: Path
) -> None:
    """Run the present stage from where `progress` stands to its end, saving a checkpoint every few minutes."""
    stage, size = progress.stage, args.batch[progress.stage]
    data = digits.load_digits("train")
    alphas = latte.build_scheduler().alphas_cumprod.to(args.device)
    step_fn = torch.compile(trainee) if args.compile else trainee
    base = [[group["lr"] for group in optimizer.param_groups] for optimizer in build_optimizers(trainee, args)]
    saved = clock = time.perf_counter()
    total, count = torch.zeros((), device=args.device), 0
    while (done := stage_done(progress, args)) < 1:
        step = progress.steps[stage]
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * learning_rate_factor(done, step)
        batch = draw_batch(data, trainee.text, size, stage, seed=(args.seed * 2 + stage) * 10_000_000 + step)
        loss = compute_loss(step_fn, tuple(part.to(args.device) for part in batch), alphas, stage)
        loss.backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        update_ema(ema, trainee, step)
        now = time.perf_counter()
        total, count = total + loss.detach(), count + 1
        progress.seconds[stage] += now - clock
        progress.steps[stage] += 1
        progress.samples[stage] += size
        clock = now
        if progress.steps[stage] % args.log_every == 0:
            speed = progress.samples[stage] / progress.seconds[stage]
            minutes = progress.seconds[stage] / 60
            print(f"stage {stage + 1} step {step + 1} {minutes:.1f} min loss {total / count:.4f} {speed:.0f}/s", flush=True)
            total, count = torch.zeros_like(total), 0
        if now - saved > 60 * args.save_minutes:
            save_checkpoint(path, trainee, ema, optimizers, progress)
            saved = now


def export(checkpoint: Path, weights: Path) -> None:
    """Write the averaged weights of a checkpoint as the demo's package data."""
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    trainee = Trainee()
    trainee.load_state_dict(state["ema"])
    latte.save(latte.Demo(trainee.transformer, latte.build_scheduler(), trainee.text), weights)
    print(f"exported {state['progress']} to {weights}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the checkpoint")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="only write the checkpoint's weights to FOLDER")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--stage-minutes", type=float, nargs=2, default=(30.0, 60.0), metavar=("FRAMES", "CLIPS"))
    parser.add_argument("--stage-steps", type=int, nargs=2, metavar=("FRAMES", "CLIPS"), help="instead of minutes")
    parser.add_argument("--batch", type=int, nargs=2, default=(256, 32), metavar=("FRAMES", "CLIPS"))
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    parser.add_argument("--adamw-lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--save-minutes", type=float, default=3.0)
    args = parser.parse_args()
    if args.export:
        export(args.out / "checkpoint.pt", args.export)
    else:
        train(args)


if __name__ == "__main__":
    main()
