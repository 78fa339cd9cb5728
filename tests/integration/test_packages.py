"""What `python -m build` makes: everything that the package needs in the wheel, everything there is in the sdist."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
"""The two hooks that `python -m build` calls."""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for setuptools leaves folders where it works."""
    tree = tmp_path_factory.mktemp("packages") / "tree"
    left = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "ckpts", "evals")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=left)
    shutil.copy(ROOT / ".dockerignore", tree)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=tree, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return tree / "dist"


def files_of(*folders: str) -> set[str]:
    """All below these folders of the repository."""
    below = (path for folder in folders for path in (ROOT / folder).rglob("*"))
    return {str(path.relative_to(ROOT)) for path in below if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_is_the_package_and_nothing_else(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == files_of("RL2")
        # a link in the repository, a file in the wheel: `rl2 demo` runs without the repository
        assert wheel.read("RL2/tools/reproduce/gsm8k.py") == (ROOT / "envs" / "gsm8k.py").read_bytes()


def test_the_sdist_is_the_whole_source(dist: Path) -> None:
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        names = {str(Path(*Path(member.name).parts[1:])) for member in sdist if member.isfile()}
    wanted = files_of("RL2", "benchmarks", "docker", "docs", "envs", "examples", "requirements", "tests")
    assert wanted | {"README.md", "LICENSE", "Makefile", "CITATION.cff"} <= names
