"""The wheel has what an installed kn_detectron needs, and asks for what it can get."""

import ast
import graphlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import kn_detectron

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy, since building leaves files beside the sources.
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    # Other tests' processes may be writing compiled modules.
    compiled = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kn_detectron", folder / "kn_detectron", ignore=compiled)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    result = subprocess.run(
        [*command, "--no-index", "--wheel-dir", str(folder), str(folder)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    (path,) = folder.glob("*.whl")
    return path


def files(pattern):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "kn_detectron").glob(pattern)}


def test_wheel_has_all_modules_configs_weights_and_photographs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules, configs = files("**/*.py"), files("model_zoo/configs/**/*.yaml")
    weights = files("model_zoo/weights/*.pth")
    assert "kn_detectron/__init__.py" in modules
    assert "kn_detectron/model_zoo/configs/mask_rcnn_R50_C4_KN.yaml" in configs
    assert "kn_detectron/model_zoo/weights/slim_R50_KN.pth" in weights
    photos = files("data/photos/**/*.jpg") | files("data/photos/annotations/*.json")
    assert len(photos) == 138 and "kn_detectron/data/photos/ATTRIBUTION.md" in names
    assert modules | configs | weights | photos <= names
    assert not [name for name in names if name.startswith(("tests/", "tools/"))]


def test_wheel_has_the_licence(wheel):
    with zipfile.ZipFile(wheel) as archive:
        texts = {n.rpartition("/")[2]: n for n in archive.namelist() if ".dist-info/" in n}
        for name in ("LICENSE", "NOTICE"):
            assert archive.read(texts[name]) == (ROOT / name).read_bytes()


def test_configs_lie_at_the_top_too():
    assert (ROOT / "configs").samefile(ROOT / "kn_detectron" / "model_zoo" / "configs")


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_wheel_does_not_ask_for_detectron2(metadata):
    requirements = metadata.get_all("Requires-Dist")
    assert any(requirement.startswith("torch>=") for requirement in requirements)
    assert not [requirement for requirement in requirements if "detectron" in requirement.lower()]
    assert metadata["Name"] == "kn_detectron"
    assert metadata["Requires-Python"] == ">=3.10"


def imported():
    """The packages that kn_detectron imports, without Python's own."""
    names = set()
    for path in (ROOT / "kn_detectron").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module)
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_what_is_imported_is_declared(metadata):
    declared = {
        re.match(r"[\w.-]+", requirement)[0].lower()
        for requirement in metadata.get_all("Requires-Dist")
        if "extra ==" not in requirement
    }
    # PyPI does not have the first; the second belongs to its LazyConfig; the third comes with torch
    # where there are GPUs for it; the fourth is an extra.
    packages = imported() - {"detectron2", "omegaconf", "triton", "timm"}
    assert {"numpy", "torch", "yaml"} <= packages
    # The headless build that the tests run with has the same module.
    provided = {**packages_distributions(), "cv2": ["opencv-python"]}
    undeclared = {p for p in packages if not {d.lower() for d in provided[p]} & declared}
    assert not undeclared


def test_the_wheels_version_is_the_packages(wheel):
    assert wheel.name.split("-")[1] == kn_detectron.__version__


@pytest.mark.parametrize(
    "variables, sentence",
    [
        (["PYTHON=no-such-python"], "There is no no-such-python here"),
        (["PYTHON=./old-python"], "./old-python is older than Python 3.10"),
        (["DETECTRON2=no/such/folder"], "DETECTRON2=no/such/folder is not a checkout"),
    ],
)
def test_make_says_what_it_lacks(tmp_path, variables, sentence):
    for name in ("Makefile", "setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    old_python = tmp_path / "old-python"
    # As far as the Makefile can tell: the check of its version fails.
    old_python.write_text("#!/bin/sh\nexit 1\n")
    old_python.chmod(0o755)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    result = subprocess.run(
        ["make", "venv", *variables],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert sentence in result.stderr
    assert not (tmp_path / ".venv").exists()


def test_packages_import_each_other_in_one_direction():
    """Packages and modules at the top; ``__init__`` puts them together."""
    imports = {}
    for path in (ROOT / "kn_detectron").rglob("*.py"):
        module = path.relative_to(ROOT).with_suffix("").parts
        importing = imports.setdefault(module[1], set())
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                target = [*module[: -node.level], *(node.module or "").split(".")]
                names = [target[1]] if target[1] else [alias.name for alias in node.names]
                importing.update(set(names) - {module[1]})
    assert {"layers", "modeling"} <= imports["__init__"]
    order = list(graphlib.TopologicalSorter(imports).static_order())
    assert order.index("layers") < order.index("modeling") < order.index("checkpoint")
