"""fakes: tensors without data (`torch._subclasses.fake_tensor`, `torch._guards`).

- `FakeTensor`, `FakeTensorMode`: shapes of captured graphs, trial runs without data. Since 2.6.
- `unset_fake_temporarily`: work on a user's own fake tensors. Since 2.6.
- `detect_fake_mode`: the mode that tensors belong to. Since 2.6.
- `LOG`: the name under which errors of fake tensors are logged. Since 2.6.
"""

from __future__ import annotations

from .release import expecting

with expecting("fake tensors"):
    from torch._guards import detect_fake_mode
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

LOG = "torch._subclasses.fake_tensor"

__all__ = ["LOG", "FakeTensor", "FakeTensorMode", "detect_fake_mode", "unset_fake_temporarily"]
