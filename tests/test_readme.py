"""The README's code runs as it stands there."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from pipelines import call_latte
from pipelines import make_latte as make_pipeline
from test_end_to_end import make_latte

import pabc

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.runtime
README = (Path(__file__).parents[1] / "README.md").read_text()
SECTIONS = re.split(r"^##+ ", README, flags=re.MULTILINE)[1:]
BLOCKS = {
    section.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.M)
    for section in SECTIONS
}


@pytest.fixture(scope="module")
def names():
    """What the reader is said to have: a model, a scheduler, latents, text, a pipeline."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(12)
    generator = torch.Generator().manual_seed(0)
    given = {
        "torch": torch,
        "scheduler": scheduler,
        "transformer": make_latte(num_layers=2),
        "latents": torch.randn(1, 4, 3, 8, 8, generator=generator),
        "text": torch.randn(1, 5, 10, generator=generator),
        "pipe": make_pipeline(),
        "prompt": call_latte(1, 1),
    }
    with torch.no_grad():
        (use,) = BLOCKS["Use"]
        exec(use, given)
    return given


def test_the_example_reuses(names):
    assert names["fast"].stats.generations == 1
    assert names["fast"].stats.reused > 0
    assert names["latents"].isfinite().all()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("section", [name for name, found in BLOCKS.items() if found])
def test_code_of(section, names, monkeypatch, tmp_path):
    if section == "Use":
        return  # has run: the others go on from there
    monkeypatch.chdir(tmp_path)
    compile_eager = partial(pabc.compile, backend="eager")
    given = dict(names)
    given["fast"] = compile_eager(given["transformer"], names["schedule"])
    with torch.no_grad():
        when = torch.full((1,), int(given["scheduler"].timesteps[0]))
        given["fast"](given["latents"], timestep=when, encoder_hidden_states=given["text"])
        given["fast"].reset()
        monkeypatch.setattr(pabc, "compile", compile_eager)
        compile_pipeline = partial(pabc.compile_pipeline, backend="eager")
        monkeypatch.setattr(pabc, "compile_pipeline", compile_pipeline)
        for block in BLOCKS[section]:
            exec(block, given)


def test_links_within_lead_somewhere():
    anchors = {re.sub(r"[^\w -]", "", name.partition("\n")[0]).lower() for name in SECTIONS}
    links = re.findall(r"\]\(#([^)]+)\)", README)
    assert links
    assert set(links) <= {anchor.replace(" ", "-") for anchor in anchors}
