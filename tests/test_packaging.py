"""An installed pabc is one top-level package, whatever the folders of the checkout are called.

A wheel and a source distribution are built from this checkout, without a network, and each is
installed into a virtual environment of its own, which sees the packages that run this test.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_INPUTS = ("pabc", "passes", "kernels", "setup.py", "pyproject.toml", "LICENSE", "README.md")
# Imports that a plain `import pabc` must not need.
OPTIONAL = ("diffusers", "safetensors", "sklearn", "PIL", "tqdm", "transformers")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check", "-q")
BUILD_SDIST = "from setuptools.build_meta import build_sdist; import sys; build_sdist(sys.argv[1])"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A wheel and a source distribution, built from a copy of this checkout."""
    source, dist = (tmp_path_factory.mktemp(name) for name in ("source", "dist"))
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    run([sys.executable, "-c", BUILD_SDIST, str(dist)], cwd=source)
    run_pip("wheel", *OFFLINE, "--wheel-dir", str(dist), str(source))
    (wheel,), (sdist,) = dist.glob("pabc-*.whl"), dist.glob("pabc-*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


class Environment:
    """A virtual environment that sees the packages of this one, and has one that is its own."""

    def __init__(self, folder: Path, distribution: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder = folder
        (self.site,) = folder.glob("lib/python*/site-packages")
        seen = [path for path in sys.path if Path(path).name.endswith("-packages")]
        # Their own .pth files, which make a checkout importable, are not read.
        (self.site / "seen.pth").write_text("\n".join(seen))
        self.python = folder / "bin/python"
        run_pip(
            "--python",
            str(self.python),
            "install",
            *OFFLINE,
            "--ignore-installed",
            "--no-compile",
            str(distribution),
        )

    def run(self, code: str) -> str:
        """Returns what code prints, away from the checkout."""
        return self.command(str(self.python), "-I", "-c", code)

    def command(self, *command: str) -> str:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return run(command, cwd=self.folder, env=env)


@pytest.fixture(scope="module")
def environment(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment into which the wheel was installed."""
    return Environment(tmp_path_factory.mktemp("environment") / "venv", built["wheel"])


@pytest.fixture(scope="module")
def installed(environment: Environment) -> Path:
    return environment.site


def run(command, **options) -> str:
    done = subprocess.run([*command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_pip(*args: str) -> None:
    run([sys.executable, "-m", "pip", *args])


def test_wheel_holds_one_top_level_package(built):
    found = {Path(name).parts[0] for name in zipfile.ZipFile(built["wheel"]).namelist()}
    assert {name for name in found if not name.endswith(".dist-info")} == {"pabc"}


def test_top_level_passes_and_kernels_are_not_importable(environment, installed):
    code = """
import importlib.util, pabc
for name in ("passes", "kernels"):
    spec = importlib.util.find_spec(name)
    print(spec.origin if spec else None)
"""
    passes, kernels = environment.run(code).splitlines()
    assert passes == "None"
    # A package named `kernels` may be installed; it must not be this project's.
    assert kernels == "None" or not Path(kernels).is_relative_to(installed)
    assert kernels == "None" or not Path(kernels).is_relative_to(ROOT)


def test_inner_packages_import(environment, installed):
    code = """
import pabc, pabc.passes, pabc.kernels
print(pabc.__file__, pabc.passes.__file__, pabc.kernels.__file__)
"""
    for path in environment.run(code).split():
        assert Path(path).is_relative_to(installed)


def test_import_needs_no_optional_package(environment):
    code = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # importing it raises ImportError
import pabc, pabc.passes, pabc.kernels
print(*pabc.__all__)
"""
    assert "compile" in environment.run(code)


@pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="needs diffusers")
def test_diffusers_imports_beside_it(environment):
    code = "import pabc; from diffusers import LatteTransformer3DModel as m; print(m.__name__)"
    assert environment.run(code).strip() == "LatteTransformer3DModel"


def test_package_data_is_in_the_wheel(installed):
    assert (installed / "pabc/py.typed").exists()
    kinds = ("json", "safetensors", "npz", "md")
    for kept in ("*.html", *(f"weights/**/*.{kind}" for kind in kinds)):
        for path in (ROOT / "pabc/demo").glob(kept):
            copied = installed / path.relative_to(ROOT)
            assert copied.read_bytes() == path.read_bytes()


def test_every_module_is_in_the_wheel(installed):
    places = {"pabc": "pabc", "passes": "pabc/passes", "kernels": "pabc/kernels"}
    for folder, place in places.items():
        for path in (ROOT / folder).rglob("*.py"):
            assert (installed / place / path.relative_to(ROOT / folder)).exists(), path


def test_version_is_the_same_everywhere(environment):
    code = """
import importlib.metadata, pabc
print(pabc.__version__, importlib.metadata.version("pabc"))
"""
    assert len(set(environment.run(code).split())) == 1


COMPILE = """
import torch, pabc
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x, timestep):
        h = x + timestep[:, None, None]
        q, k, v = self.qkv(h).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return h + self.out(y.transpose(1, 2).flatten(2))

steps = [900.0, 600.0, 300.0]
model, x = Block().eval(), torch.randn(2, 6, 8)
fast = pabc.compile(model, pabc.Schedule.pyramid(steps, full=2), backend="eager")
with torch.no_grad():
    first = [t.equal(m) for t, m in [(fast(x, torch.full((2,), s)), model(x, torch.full((2,), s)))
                                     for s in steps]]
print(pabc.__file__, first)
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installed_package_compiles_and_has_its_command(kind, built, tmp_path):
    environment = Environment(tmp_path / "venv", built[kind])
    file, _, equal = environment.run(COMPILE).strip().partition(" ")
    assert Path(file).is_relative_to(environment.site)
    assert equal == "[True, False, True]", "the second step reuses the attention of the first"
    assert "explain" in environment.command(str(environment.folder / "bin/pabc"), "--help")


def test_wheel_from_the_source_distribution_is_the_same(built, tmp_path):
    run_pip("wheel", *OFFLINE, "--wheel-dir", str(tmp_path), str(built["sdist"]))
    (wheel,) = tmp_path.glob("pabc-*.whl")
    names = [set(zipfile.ZipFile(path).namelist()) for path in (built["wheel"], wheel)]
    assert names[0] == names[1]
