"""The models that Pyramid Attention Broadcast was published with, in plain PyTorch.

| class | original | attention |
|---|---|---|
| :class:`OpenSora12` | Open-Sora 1.2, STDiT3 | spatial, temporal, cross |
| :class:`OpenSoraPlan11` | Open-Sora-Plan 1.1, LatteT2V | spatial, temporal, cross |
| :class:`OpenSoraPlan12` | Open-Sora-Plan 1.2, OpenSoraT2V | full, cross |
| :class:`LatteT2V` | Latte, text-to-video | spatial, temporal, cross |
| :class:`LatteClass` | Latte, class-conditional and unconditional | spatial, temporal |

Each is built by `from_config` from the original's configuration, loads the original's published
checkpoints, takes the same arguments, and returns the same predictions:

    model = LatteT2V.from_config(json.loads(Path("config.json").read_text())).eval()
    model.load_state_dict(load_file("diffusion_pytorch_model.safetensors"))
    noise = model(latents, timestep, text)

They are written for :func:`torch.export.export`: no control flow depends on the values of tensors,
so that a whole forward is one graph. Texts of unequal lengths are masked, not packed as in the
originals.

Files: `config` (configurations), `positions` (position embeddings, rotary tables), `layers` (shared
layers), `pixart` (parts shared by Latte's text-to-video model and Open-Sora-Plan), and one file per
family: `latte`, `opensora`, `opensora_plan`.
"""

from pabc.models.latte import LatteClass, LatteT2V
from pabc.models.opensora import OpenSora12
from pabc.models.opensora_plan import OpenSoraPlan11, OpenSoraPlan12

__all__ = ["LatteClass", "LatteT2V", "OpenSora12", "OpenSoraPlan11", "OpenSoraPlan12"]
