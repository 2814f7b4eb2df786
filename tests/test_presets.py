import json
from pathlib import Path

import numpy as np
import pytest

from pabc import presets
from pabc.plan import SlotSpec
from pabc.schedule import Schedule

# Which steps the method's own code reused, recorded from small models with seeded weights.
RECORDED = json.loads((Path(__file__).parent / "data/videosys_decisions.json").read_text())
RUNS = [(model, run["name"]) for model, record in RECORDED.items() for run in record["runs"]]
PRESET_OF = {
    "latte": presets.latte,
    "osp110": presets.opensora_plan11,
    "osp120": presets.opensora_plan12,
    "stdit3": presets.opensora12,
}


def load_run(model: str, name: str) -> tuple[dict, dict, list[SlotSpec], np.ndarray]:
    """A recording: the model's record, the run, one slot per recorded column, reuse table."""
    record = RECORDED[model]
    run = next(run for run in record["runs"] if run["name"] == name)
    slots: list[SlotSpec] = []
    for depth, columns in enumerate(run["reused"]):
        for place, (kind, _) in enumerate(zip(record["kinds"], columns, strict=True)):
            layer = sum(slot.kind == kind for slot in slots)
            slots.append(SlotSpec(f"{depth}.{place}.{kind}", kind, layer))
    columns = [column for depth in run["reused"] for column in depth]
    return record, run, slots, np.array([[c == "." for c in column] for column in columns]).T


def build_from_config(record: dict, config: dict) -> Schedule:
    """The schedule that a recorded configuration describes, built from pabc's parts."""
    kinds = {"spatial": "full" if "full" in record["kinds"] else "spatial"}
    given = {
        kinds.get(kind, kind): (config[f"{kind}_range"], tuple(config[f"{kind}_threshold"]))
        for kind in ("spatial", "temporal", "cross")
        if config.get(f"{kind}_broadcast")
    }
    steps = record["timesteps"]
    schedule = Schedule.pyramid(
        steps,
        window={kind: window for kind, (_, window) in given.items()},
        **{kind: every for kind, (every, _) in given.items()},
    )
    for offset, part in enumerate(("spatial", "temporal")):
        keys = config.get(f"mlp_{part}_broadcast_config", {})
        mask = [False] * len(steps)
        for key, entry in keys.items():
            if int(key) in steps:
                first = steps.index(int(key)) + 1
                reused = range(first, min(first + entry["skip_count"], len(steps)))
                mask = [m or step in reused for step, m in enumerate(mask)]
        mask = [m and str(int(t)) not in keys for m, t in zip(mask, steps, strict=True)]
        for entry in list(keys.values())[:1]:
            layers = [2 * block + offset for block in entry["block"]]
            schedule = schedule.override(kind="mlp", layers=layers, mask=mask)
    return schedule


@pytest.mark.parametrize(("model", "run"), RUNS)
def test_recorded_configuration_gives_the_recorded_decisions(model, run):
    record, content, slots, reuse = load_run(model, run)
    schedule = build_from_config(record, content["config"])
    assert np.array_equal(schedule.plan(slots).reuse, reuse)


@pytest.mark.parametrize(("model", "run"), RUNS)
def test_preset_gives_the_recorded_decisions(model, run):
    record, content, slots, reuse = load_run(model, run)
    with_mlp = bool(content["config"].get("mlp_broadcast"))
    schedule = PRESET_OF[model](record["timesteps"], mlp=with_mlp)
    assert np.array_equal(schedule.plan(slots).reuse, reuse)


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 30, 50, 100, 150])
def test_presets_take_any_number_of_steps(name, num_steps):
    steps = np.linspace(999, 0, num_steps)
    if num_steps <= 2:  # neither 999 nor 0 lies in a window
        with pytest.warns(UserWarning, match="holds none of the"):
            schedule = presets.get(name)(steps)
    else:
        schedule = presets.get(name)(steps)
        assert schedule.masks
    assert schedule.num_steps == num_steps


@pytest.mark.parametrize("preset", [presets.latte, presets.opensora12, presets.opensora_plan11])
@pytest.mark.parametrize("num_steps", [10, 20, 25, 40, 64, 150])
def test_mlp_broadcast_survives_other_step_counts(preset, num_steps):
    steps = np.linspace(999, 0, num_steps)
    plan = preset(steps).plan([SlotSpec("mlp", "mlp", 0)])
    assert plan.reuse.any()
    assert not preset(steps, mlp=False).plan([SlotSpec("mlp", "mlp", 0)]).reuse.any()


def test_mlp_broadcast_leaves_later_layers_alone():
    for preset, num_layers in ((presets.latte, 10), (presets.opensora_plan11, 14)):
        slots = [SlotSpec(f"mlp.{i}", "mlp", i) for i in range(20)]
        reused = preset(range(980, -1, -20)).plan(slots).reuse.any(axis=0)
        assert reused.tolist() == [True] * num_layers + [False] * (20 - num_layers)


def test_key_falls_on_the_first_of_equally_near_steps():
    mask = presets._find_mlp_mask((740.0, 730.0, 710.0, 700.0, 690.0, 0.0), [720])
    assert mask == [False, False, True, True, False, False]


def test_keys_on_one_step_count_once_and_key_steps_compute():
    mask = presets._find_mlp_mask((900.0, 700.0, 500.0, 300.0, 100.0, 0.0), [720, 690, 510])
    assert mask == [False, False, False, True, True, False]


def test_keys_beyond_the_timesteps_run_do_not_count():
    assert not any(presets._find_mlp_mask((600.0, 580.0, 560.0), [864, 788, 676]))


def test_repeated_timesteps_of_second_order_solvers():
    mask = presets._find_mlp_mask((740.0, 720.0, 720.0, 700.0, 700.0), [720])
    assert mask == [False, False, True, True, False]


def test_unknown_preset_is_named():
    with pytest.raises(
        ValueError, match=r"preset: expected one of opensora12, opensora_plan11.*, found 'sora'"
    ):
        presets.get("sora")


def test_preset_settings():
    steps = range(999, 0, -10)
    assert presets.get("cogvideox")(steps) == Schedule.pyramid(steps, joint=2, window=(100, 850))
    assert presets.vchitect2(steps) == Schedule.pyramid(
        steps, spatial=2, temporal=4, cross=6, window=(100, 800)
    )
