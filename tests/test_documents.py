"""The documents are true: their code runs, their commands parse, their links lead somewhere.

A document is any Markdown file of the repository. Its code blocks are labeled:

- ```` ```python ````: run, in order, in one namespace for each document;
- ```` ```python no-run: REASON ````: shown only; `test_code_that_is_not_run` lists all of them;
- ```` ```bash ````: commands, of which programs, scripts, options, extras and paths are checked;
- ```` ```text ````: anything else.

Names that the blocks of a document need, such as a model, stand in a comment on its first line:
`<!-- provided: transformer, scheduler -->`; :data:`PROVIDED` says how each is made.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from modular import MODULAR_CALL, make_modular
from pipelines import call_latte
from pipelines import make_latte as make_pipeline
from small_latte import make_latte

import pabc
from pabc import __main__ as command_line
from pabc import pipeline

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.runtime
ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
COMMENT = re.compile(r"^<!-- provided: (.*) -->\n")
NOT_RUN: dict[str, str] = {"pabc/pipelines/RECIPES.md": "needs published weights"}
"""Document -> the reason why it has code that is not run here."""


def find_documents() -> list[Path]:
    """Returns the Markdown files that git knows of; without git, those of the tree."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    if listed.returncode:
        folders = ("pabc", "passes", "kernels", "bench", "tests")
        paths = [*ROOT.glob("*.md"), *(p for f in folders for p in (ROOT / f).rglob("*.md"))]
    return sorted(path for path in paths if path.is_file())


@dataclass(frozen=True)
class Block:
    """A fenced block: its label, its text, and the line of the document that it begins after."""

    label: str
    text: str
    line: int


class Document:
    """A Markdown file, read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path.relative_to(ROOT))
        self.source = path.read_text()
        self.blocks = [
            Block(found[1].strip(), found[2], self.source.count("\n", 0, found.start(2)))
            for found in FENCE.finditer(self.source)
        ]
        self.prose = FENCE.sub("", self.source)

    @property
    def provided(self) -> list[str]:
        """The names that its code takes as given."""
        found = COMMENT.match(self.source)
        return found[1].split(", ") if found else []

    @property
    def anchors(self) -> set[str]:
        """What links to its headings end in, as GitHub makes it."""
        headings = re.findall(r"^#+ (.*)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}

    def labeled(self, label: str) -> list[Block]:
        return [block for block in self.blocks if block.label == label]


DOCUMENTS = [Document(path) for path in find_documents()]
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)


def make_scheduler() -> Any:
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(12)
    return scheduler


def make_fast(names: Mapping[str, Any]) -> pabc.CompiledModel:
    """Returns the compiled model after its first call, at the start of a generation."""
    fast = pabc.compile(names["transformer"], names["schedule"], backend="eager")
    when = torch.full((1,), int(names["scheduler"].timesteps[0]))
    with torch.no_grad():
        fast(names["latents"], timestep=when, encoder_hidden_states=names["text"])
    fast.reset()
    return fast


PROVIDED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "pabc": lambda _: pabc,
    "torch": lambda _: torch,
    "scheduler": lambda _: make_scheduler(),
    "transformer": lambda _: make_latte(num_layers=2),
    "latents": lambda _: torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    "text": lambda _: torch.randn(1, 5, 10, generator=torch.Generator().manual_seed(1)),
    "schedule": lambda names: pabc.Schedule.pyramid(
        names["scheduler"].timesteps, spatial=2, temporal=4, cross=6, fraction=(0.15, 0.85)
    ),
    "fast": make_fast,
    "pipe": lambda _: make_pipeline(),
    "prompt": lambda _: {k: v for k, v in call_latte(1, 1).items() if k != "latents"},
    "modular_pipe": lambda _: make_modular(diffusers.ClassifierFreeGuidance()),
    "embeds": lambda _: MODULAR_CALL,
}
"""Name -> what makes it, of the names before it."""


def provide(document: Document) -> dict[str, Any]:
    """Returns the namespace that a document's code begins with."""
    unknown = set(document.provided) - set(PROVIDED)
    assert not unknown, f"{document.name}: provided: expected names of PROVIDED, found {unknown}"
    names: dict[str, Any] = {}
    for name in PROVIDED:
        if name in document.provided:
            names[name] = PROVIDED[name](names)
    return names


def run(document: Document, block: Block, names: dict[str, Any]) -> None:
    """Runs a block; a traceback shows the document's own lines."""
    code = compile("\n" * block.line + block.text, str(document.path), "exec", dont_inherit=True)
    exec(code, names)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sets the environment of a process that torchrun started alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("ranks")
@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d.labeled("python")], ids=lambda d: d.name
)
def test_code_runs(document, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("compile", "compile_pipeline"):
        monkeypatch.setattr(pabc, name, partial(getattr(pabc, name), backend="eager"))
    names = provide(document)
    for block in document.labeled("python"):
        run(document, block, names)


def test_the_first_examples_reuse():
    (document,) = (d for d in DOCUMENTS if d.name == "README.md")
    names = provide(document)
    first, second, *_ = document.labeled("python")
    run(document, first, names)
    stats = names["fast_pipe"].models["transformer"].stats
    assert stats.recorded == 1, "calls of so small a model take too little for a sure speedup"
    assert "speedup=2: computes" in stats.plan_source
    assert names["video"].isfinite().all()
    names["fast_pipe"].undo()
    run(document, second, names)
    assert names["fast"].stats.generations == 1
    assert names["fast"].stats.reused > 0
    assert names["latents"].isfinite().all()


def test_the_plan_that_is_shown_is_the_plan():
    (document,) = (d for d in DOCUMENTS if d.name == "README.md")
    names = {name: make({}) for name, make in PROVIDED.items() if name in ("scheduler",)}
    names["transformer"] = make_latte(num_layers=2)
    call = {"timestep": torch.tensor([999]), "encoder_hidden_states": torch.randn(1, 5, 10)}
    schedule = PROVIDED["schedule"](names)
    found = pabc.explain(
        names["transformer"], torch.randn(1, 4, 3, 8, 8), schedule=schedule, **call
    )
    assert str(found.plan) in document.source


def test_the_plan_of_skipped_calls_that_is_shown_is_the_plan():
    (document,) = (d for d in DOCUMENTS if d.name == "pabc/README.md")
    schedule = pabc.Schedule.skip(make_scheduler().timesteps, 6)
    mlp = pabc.SlotSpec("mlp", "mlp", 0, 512, outer=("model",))
    plan = schedule.plan([mlp, pabc.SlotSpec("model", "model", 0, 1024)])
    assert str(plan) in document.source


@every_document
def test_blocks_have_a_known_label(document):
    for block in document.blocks:
        known = block.label in ("python", "bash", "text")
        assert known or re.fullmatch(r"python no-run: \S.*", block.label), (
            f"{document.name}:{block.line}: expected ```python, ```python no-run: REASON, ```bash "
            f"or ```text, found ```{block.label}"
        )
    assert document.source.count("\n```") == 2 * len(document.blocks), "a fence is left open"


def test_code_that_is_not_run():
    found = {
        d.name: block.label.removeprefix("python no-run: ")
        for d in DOCUMENTS
        for block in d.blocks
        if block.label.startswith("python no-run")
    }
    assert found == NOT_RUN


@every_document
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        to = (document.path.parent / path).resolve() if path else document.path
        assert to.exists(), f"{document.name}: there is no {target}"
        if anchor:
            assert anchor in Document(to).anchors, f"{document.name}: there is no {target}"


@every_document
def test_files_exist(document):
    for span in re.findall(r"`([^`\n]+)`", document.prose):
        if re.fullmatch(r"[\w./-]+(\.(py|md|json|toml|png|safetensors)|/)", span):
            assert is_file(span, document), f"{document.name}: there is no `{span}`"


MADE = (
    "pabc-demo/",
    "metrics.json",
    "notes.npz",
    "calibration.npz",
    "frontier.svg",
    "checks.json",
    "times.json",
    "train.json",
    "passes/swish.py",
    "tests/test_swish.py",
)
"""Paths that a reader makes."""


def is_file(span: str, document: Document) -> bool:
    """Returns whether a path is in the repository, beside the document, or anywhere by name."""
    if span in MADE or (ROOT / span).exists() or (document.path.parent / span).exists():
        return True
    return "/" not in span and any(file.name == span for file in repository_files())


@cache
def repository_files() -> tuple[Path, ...]:
    folders = ("pabc", "passes", "kernels", "bench", "tests")
    return tuple(path for folder in folders for path in (ROOT / folder).rglob("*"))


@every_document
def test_commands_exist(document):
    for block in document.labeled("bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|", line.partition(" #")[0]):
                words = [word for word in shlex.split(command) if not word.startswith("#")]
                while words and re.fullmatch(r"\w+=\S*", words[0]):  # variables
                    del words[0]
                if words:
                    check_command(words)


def check_command(words: list[str]) -> None:
    """Fails where a program, a script, an option or a path of a command is not there."""
    program, *args = words
    match Path(program).name:
        case "python" | "python3" | "torchrun":
            check_python(args)
        case "pabc":
            check_pabc(args)
        case "pytest":
            check_pytest(args)
        case "pip":
            check_pip(args)
        case "run" if program == ".ci/run":
            assert os.access(ROOT / program, os.X_OK)
            check_pytest(args)
        case "ruff" | "git" | "cd":
            pass
        case _:
            pytest.fail(f"unknown command: {shlex.join(words)}")


def check_python(args: list[str]) -> None:
    """Checks a module or a script, after options of the interpreter or the launcher."""
    while args and args[0].startswith("-") and args[0] != "-m":
        args = args[1 if "=" in args[0] or args[0] == "--standalone" else 2 :]
    if args[:1] == ["-m"]:
        checks = {"pabc": check_pabc, "pytest": check_pytest, "pip": check_pip}
        if args[1] in checks:
            checks[args[1]](args[2:])
        elif args[1] != "venv":
            assert (ROOT / (args[1].replace(".", "/") + ".py")).exists(), args[1]
        return
    assert args and (ROOT / args[0]).is_file(), f"there is no script {args[:1]}"
    options = options_of(ROOT / args[0])
    for word in args[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in options, f"{args[0]} has no option {word}"


def options_of(script: Path) -> set[str]:
    """Returns the options that a script, or a module beside it that it imports, declares."""
    source = script.read_text()
    imported = re.findall(r"^(?:import|from) (\w+)", source, re.MULTILINE)
    beside = [script.with_name(f"{name}.py") for name in imported]
    sources = [source, *(path.read_text() for path in beside if path.exists())]
    return set(re.findall(r'"(--[\w-]+)"', "\n".join(sources)))


def check_pabc(args: list[str]) -> None:
    """Parses the arguments of the command line, and runs nothing."""
    command_line._make_parser().parse_args(args)


def check_pytest(args: list[str]) -> None:
    """Checks that paths exist and markers are declared."""
    markers = re.findall(r'^  "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for before, word in zip(["", *args], args, strict=False):
        if before == "-m":
            assert set(re.findall(r"\w+", word)) - {"not", "and", "or"} <= set(markers), word
        elif before not in ("-k", "-n") and not word.startswith("-"):
            assert (ROOT / word.partition("::")[0]).exists(), f"there is no {word}"


def check_pip(args: list[str]) -> None:
    """Checks that extras of this project are declared."""
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    extras = {e for word in args for e in re.findall(r"^(?:\.|pabc)\[(.*)\]", word)}
    assert extras <= set(declared), extras


@cache
def strings_of_the_source() -> str:
    """Returns all strings of the package, with `...` in place of what is formatted in."""
    texts = []
    for folder in ("pabc", "passes", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = (getattr(part, "value", None) for part in node.values)
                    texts.append("".join(p if isinstance(p, str) else "..." for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(texts)


@every_document
def test_messages_are_those_of_the_source(document):
    """Messages are the code spans in the first column of a table headed `message`."""
    for table in re.findall(r"^\| message \|.*\n\|.*\n((?:\|.*\n)+)", document.prose, re.MULTILINE):
        for row in table.splitlines():
            for span in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
                for part in span.split("..."):
                    assert part.strip() in strings_of_the_source(), f"{document.name}: {span}"


def test_the_tables_of_stages_are_the_pipeline():
    (document,) = (d for d in DOCUMENTS if d.name == "passes/README.md")
    tables = re.findall(r"^\| stage \|.*\n\|.*\n((?:\|.*\n)+)", document.prose, re.MULTILINE)
    shown = [[tuple(row.split(" | ")) for row in table.splitlines()] for table in tables]
    lists = (pipeline.NAMING, pipeline.GUARDING, pipeline.PHASE)
    for rows, stages in zip(shown, lists, strict=True):
        expected = [
            (
                f"| `{stage.name}`",
                "may change" if stage.changes_bits else "same",
                "yes |" if stage.is_optional else "no |",
            )
            for stage in stages
        ]
        assert [(row[0], *row[-2:]) for row in rows] == expected


def test_every_option_is_in_the_overview():
    (document,) = (d for d in DOCUMENTS if d.name == "README.md")
    options = list(inspect.signature(pabc.api.compile).parameters)[2:]
    assert {name for name in options if not re.search(rf"`{name}[`=]", document.source)} == set()
