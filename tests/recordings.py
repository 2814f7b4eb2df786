"""Recordings of original models: configurations, weights, inputs and outputs."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from pabc.models import LatteClass, LatteT2V, OpenSora12, OpenSoraPlan11, OpenSoraPlan12

DATA = Path(__file__).parent / "data"
FILES = {path.stem: path for path in sorted(DATA.glob("**/*.safetensors"))}
CLASSES = {  # start of a recording's name -> class
    "latte_t2v": LatteT2V,
    "videosys_latte_t2v": LatteT2V,
    "latte_class": LatteClass,
    "latte_uncond": LatteClass,
    "opensora12": OpenSora12,
    "videosys_stdit3": OpenSora12,
    "osp11": OpenSoraPlan11,
    "videosys_osp110": OpenSoraPlan11,
    "osp12": OpenSoraPlan12,
    "videosys_osp120": OpenSoraPlan12,
}


def class_of(name):
    return next(cls for start, cls in CLASSES.items() if name.startswith(start))


def load_meta(name):
    with safe_open(FILES[name], "pt") as file:
        return json.loads(file.metadata()["golden"])


def load_part(name, part):
    tensors = load_file(FILES[name])
    return {key.removeprefix(part): t for key, t in tensors.items() if key.startswith(part)}


def load_model(name, **changes):
    """The model of a recording, with its weights, and what the recording says of itself."""
    meta = load_meta(name)
    model = class_of(name).from_config(meta["config"], **changes).eval()
    weights = load_part(name, "sd/") or load_part(Path(meta["weights_from"]).stem, "sd/")
    model.load_state_dict(weights, strict=True)
    assert model.state_dict().keys() == weights.keys()
    return model, meta
