"""Compares the Python state of a model with the one in which it was saved.

What a forward makes at its first call and keeps, notes that libraries leave, and names that a
program's forward only writes are no differences.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch import nn

from pabc.artifact.errors import ArtifactError
from pabc.artifact.sources import attributes_forward_sets, attributes_methods_read
from pabc.artifact.state import KINDS, StateTable, describe_state
from pabc.artifact.texts import OBJECT, text_of_key
from pabc.passes import HolderKey, HolderKind, ModelState

_REACHED = frozenset(KINDS[4:])
"""Kinds of places that are new or gone only where what leads to them is."""
_WITHOUT_NAMES = ("hooks", "array", "variable")
_TENSOR = ("a tensor", "(a tensor")
_MOST = 3
"""So many differences are named."""


def check_state(saved: StateTable, model: nn.Module, states: Collection[ModelState]) -> None:
    """Raises :class:`ArtifactError` if a model is in another state than the one it was saved in.

    Args:
        saved: the state that was saved.
        model: the model.
        states: for each program, the state that it depends on.
    """
    found = describe_state(model)
    differences = [
        difference
        for kind in KINDS
        for difference in _differences(kind, saved, found.table)
        if not difference.is_harmless(found.owners.get(difference.path))
        and any(map(difference.concerns, states))
    ]
    if differences:
        rest = f", and {len(differences) - _MOST} more" if len(differences) > _MOST else ""
        raise ArtifactError(
            f"model: {'; '.join(map(str, differences[:_MOST]))}{rest}; set the model as it was when"
            " it was saved, or compile it and save it again"
        )


@dataclass(frozen=True)
class _Difference:
    """Texts of a value that differ; None stands for no value."""

    kind: HolderKind
    path: str
    name: str
    old: str | None
    new: str | None

    def __str__(self) -> str:
        return f"{self._where}: expected {_short(self.old)}, found {_short(self.new)}"

    @property
    def _where(self) -> str:
        if self.kind in _WITHOUT_NAMES:
            return self.path
        if self.kind == "children":
            return f"modules of {self.path or 'the model'}"
        if self.kind == "container":
            return f"{self.path}[{self.name if self.name.isdigit() else repr(self.name)}]"
        return f"{self.path}.{self.name}" if self.path else self.name

    def concerns(self, state: ModelState) -> bool:
        """Returns False for what is within a module that a program calls as it is, and for a name
        that its forward only writes."""
        place: HolderKey = self.path, self.kind
        if place in state.shared:
            return True
        written = {text_of_key(key) for other, key in state.written if other == place}
        excluded = map(state.excludes, (place, (self._where, self.kind)))
        return self.name not in written and not any(excluded)

    def is_harmless(self, owner: type | None) -> bool:
        """Returns True for a note, and for what is made at the first call; `owner` is the class of
        the module or object that has it."""
        texts = [text for text in (self.old, self.new) if text not in (None, "None")]
        if len(texts) != 1:
            return False
        if owner is not None and self.name in attributes_forward_sets(owner):
            return texts[0].startswith((*OBJECT, "("))
        return None in (self.old, self.new) and self._may_lack(texts[0], owner)

    def _may_lack(self, text: str, owner: type | None) -> bool:
        """Returns True for a name that may be there or not: a global is read by code that is
        compared itself, and a table of tensors fills as it is used."""
        if self.kind == "globals" or (self.kind == "container" and text.startswith(_TENSOR)):
            return True
        if self.kind == "class":
            return text.startswith(OBJECT)
        if self.kind != "module" or owner is None or hasattr(owner, self.name):
            return False
        is_private = self.name.startswith("_") and self.name not in attributes_methods_read(owner)
        return is_private or text.startswith(OBJECT)


def _differences(kind: HolderKind, saved: StateTable, found: StateTable) -> Iterator[_Difference]:
    before, after = saved[kind], found[kind]
    for path in {**before, **after}:
        if kind in _REACHED and (path not in before or path not in after):
            continue
        old, new = before.get(path, {}), after.get(path, {})
        for name in {**old, **new}:
            if old.get(name) != new.get(name):
                yield _Difference(kind, path, name, old.get(name), new.get(name))


def _short(text: str | None) -> str:
    if text is None:
        return "nothing"
    return text if len(text) <= 80 else f"{text[:77]}..."
