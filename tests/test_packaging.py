"""An installed pabc is one top-level package, whatever the folders of the checkout are called."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD_INPUTS = ("pabc", "passes", "kernels", "setup.py", "pyproject.toml", "LICENSE", "README.md")
# Imports that a plain `import pabc` must not need.
OPTIONAL = ("diffusers", "safetensors", "sklearn", "PIL", "tqdm", "transformers")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a wheel built from this checkout was installed."""
    source, wheels, target = (
        tmp_path_factory.mktemp(name) for name in ("source", "wheels", "site")
    )
    for name in BUILD_INPUTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, source / name)
    offline = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet"]
    run_pip("wheel", *offline, "--no-build-isolation", "--wheel-dir", str(wheels), str(source))
    (wheel,) = wheels.glob("pabc-*.whl")
    run_pip("install", *offline, "--target", str(target), str(wheel))
    return target


def run_pip(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run_installed(target: Path, code: str) -> str:
    """Run code with `target` first on the import path, away from the checkout."""
    code = f"import sys; sys.path.insert(0, {str(target)!r})\n{code}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=target.parent,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_one_top_level_package(installed):
    found = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert found - {"bin"} == {"pabc"}


def test_top_level_passes_and_kernels_are_not_importable(installed):
    code = """
import importlib.util, pabc
for name in ("passes", "kernels"):
    spec = importlib.util.find_spec(name)
    print(spec.origin if spec else None)
"""
    passes, kernels = run_installed(installed, code).splitlines()
    assert passes == "None"
    # A package named `kernels` may be installed; it must not be this project's.
    assert kernels == "None" or not Path(kernels).is_relative_to(installed)
    assert kernels == "None" or not Path(kernels).is_relative_to(ROOT)


def test_inner_packages_import(installed):
    code = """
import pabc, pabc.passes, pabc.kernels
print(pabc.__file__, pabc.passes.__file__, pabc.kernels.__file__)
"""
    for path in run_installed(installed, code).split():
        assert Path(path).is_relative_to(installed)


def test_import_needs_no_optional_package(installed):
    code = f"""
for name in {OPTIONAL!r}:
    sys.modules[name] = None  # importing it raises ImportError
import pabc, pabc.passes, pabc.kernels
print(*pabc.__all__)
"""
    assert "compile" in run_installed(installed, code)


@pytest.mark.skipif(not importlib.util.find_spec("diffusers"), reason="needs diffusers")
def test_diffusers_imports_beside_it(installed):
    code = "import pabc; from diffusers import LatteTransformer3DModel as m; print(m.__name__)"
    assert run_installed(installed, code).strip() == "LatteTransformer3DModel"


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


def test_version_is_the_same_everywhere(installed):
    code = """
import importlib.metadata, pabc
print(pabc.__version__, importlib.metadata.version("pabc"))
"""
    assert len(set(run_installed(installed, code).split())) == 1
