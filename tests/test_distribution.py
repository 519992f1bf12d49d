"""What is built for an index of packages."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", "outputs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)


def build(folder: Path, kind: str) -> Path:
    """The `"sdist"` or `"wheel"` that setuptools makes of a copy of this tree."""
    tree = shutil.copytree(ROOT, folder / "tree", ignore=NOT_COPIED)
    code = f"from setuptools.build_meta import build_{kind}; build_{kind}({str(folder / 'dist')!r})"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True)
    return next((folder / "dist").iterdir())


def test_the_source_distribution_is_the_repository(tmp_path):
    """So that the tests run from it, with all that they read."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no checkout")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tarfile.open(build(tmp_path, "sdist")) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {name for name in tracked.splitlines() if (ROOT / name).exists()} <= files


def test_the_wheel_is_the_package_alone_and_says_that_it_has_types(tmp_path):
    with zipfile.ZipFile(build(tmp_path, "wheel")) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        metadata = archive.read(next(name for name in archive.namelist() if name.endswith("/METADATA"))).decode()
    package = ROOT / "src" / "diffusers_far"
    modules = {f"diffusers_far/{path.relative_to(package)}" for path in package.rglob("*.py")}
    assert set(files) == {"diffusers_far/py.typed", "diffusers_far/evaluation/crafter_tiles.png", *modules}
    for line in (
        "License-Expression: Apache-2.0",
        "Classifier: Typing :: Typed",
        "Project-URL: Paper, https://arxiv.org/",
    ):
        assert line in metadata


def test_an_installed_wheel_brings_the_program_far(tmp_path):
    site, wheel = tmp_path / "site", build(tmp_path, "wheel")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([*map(str, install)], check=True, capture_output=True)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for command in ("generate", "play", "evaluate", "prepare"):
        result = subprocess.run(
            [site / "bin" / "far", command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0 and f"usage: far {command} " in result.stdout, result.stderr
