"""diffusers' Latte with recorded weights against trajectories recorded from VideoSys.

VideoSys caches the gated branch and counts steps per module; `cut="branch"` and the published
preset must give its outputs at every step, MLP broadcast included.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import pabc

DATA = Path(__file__).parent / "data"
TRAJECTORY_TOLERANCE = 3e-5


@pytest.fixture(scope="module")
def model():
    diffusers = pytest.importorskip("diffusers")
    path = DATA / "videosys_latte_t2v_basic.safetensors"
    tensors = load_file(path)
    unknown = {"attention_type", "norm_num_groups"}  # of the original class, without effect here
    config = {k: v for k, v in load_golden(path)["config"].items() if k not in unknown}
    model = diffusers.LatteTransformer3DModel(**config).eval()
    weights = {k[3:]: v for k, v in tensors.items() if k.startswith("sd/")}
    model.load_state_dict(weights, strict=True)
    with torch.no_grad():
        out = model(
            tensors["in/hidden_states"],
            tensors["in/timestep"],
            tensors["in/encoder_hidden_states"],
            return_dict=False,
        )[0]
    assert (out - tensors["out/out"]).abs().max() < 1e-5, "weights or class do not fit"
    return model


@pytest.fixture(scope="module")
def recorded():
    return load_file(DATA / "videosys_latte_t2v_pab_traj.safetensors")


def load_golden(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["golden"])


def run(fast, recorded, timesteps):
    z, outputs = recorded["in/z"], []
    for t in timesteps:
        when = torch.full((len(z),), t)
        out = fast(z, when, recorded["in/encoder_hidden_states"], return_dict=False)[0]
        z = z - 0.05 * out[:, : z.shape[1]]
        outputs.append(out)
    return torch.stack(outputs), z


@pytest.mark.parametrize("name", ["nopab", "pab", "pab_mlp"])
@pytest.mark.parametrize("backend", ["eager", "oracle"])
def test_videosys_trajectory(model, recorded, name, backend, add_row):
    timesteps = load_golden(DATA / "videosys_latte_t2v_pab_traj.safetensors")["timesteps"]
    schedule = {
        "nopab": pabc.Schedule.none(timesteps),
        "pab": pabc.presets.latte(timesteps, mlp=False),
        "pab_mlp": pabc.presets.latte(timesteps),
    }[name]
    fast = pabc.compile(model, schedule, backend=backend, cut="branch")
    outputs, latents = run(fast, recorded, timesteps)
    errors = (outputs - recorded[f"out/outputs_{name}"]).abs().flatten(1).amax(1)
    assert errors.max() < TRAJECTORY_TOLERANCE, f"largest error at step {int(errors.argmax())}"
    final = (latents - recorded[f"out/latents_final_{name}"]).abs().max()
    assert final < TRAJECTORY_TOLERANCE
    recording = f"videosys_latte_t2v_pab_traj, {name}, {backend}"
    add_row("golden recordings", recording=recording, error=f"{errors.max():.1e}", decisions="")


@pytest.mark.parametrize("name", ["pab", "pab_mlp"])
def test_videosys_decisions(model, recorded, name):
    timesteps = load_golden(DATA / "videosys_latte_t2v_pab_traj.safetensors")["timesteps"]
    schedule = pabc.presets.latte(timesteps, mlp=name == "pab_mlp")
    z, text = recorded["in/z"], recorded["in/encoder_hidden_states"]
    when = torch.full((len(z),), timesteps[0])
    fast = pabc.compile(model, schedule, backend="eager", example_inputs=((z, when, text), {}))
    decisions = recorded[f"out/decisions_{name}"].bool()  # [step, depth, 5]
    columns = {"spatial": [0], "cross": [1], "mlp": [2, 4], "temporal": [3]}
    for slot, spec in enumerate(fast.plan.slots):
        depth, which = divmod(spec.layer, len(columns[spec.kind]))
        expected = decisions[:, depth, columns[spec.kind][which]]
        assert fast.plan.reuse[:, slot].tolist() == expected.tolist(), spec
