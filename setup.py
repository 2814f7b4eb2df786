"""Package layout; everything else is in pyproject.toml.

The folders `passes` and `kernels` are installed inside `pabc`: a top-level module named `kernels`
would collide with the package of that name which diffusers and transformers import.
"""

from setuptools import find_packages, setup

MAPPED = ("passes", "kernels")

packages = find_packages(include=["pabc", "pabc.*"])
package_dir = {"pabc": "pabc"}
for folder in MAPPED:
    inner = [f"{folder}.{name}" for name in find_packages(folder)]
    packages += [f"pabc.{name}" for name in (folder, *inner)]
    package_dir[f"pabc.{folder}"] = folder

setup(packages=packages, package_dir=package_dir)
