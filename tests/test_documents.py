"""The documents: links lead somewhere, commands are understood, and code runs.

That the commands of GETTING_STARTED do what it says is seen in test_getting_started.py.
"""

import argparse
import ast
import re
import runpy
import sys
from pathlib import Path

import pytest
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model

import kn_detectron
from kn_detectron.engine.config_file import read_config
from kn_detectron.layers import kalman_layers
from kn_detectron.pretraining import add_pretraining_config

from .documents import NAMES, ROOT, blocks, commands, prose, read
from .models import detectron2_configs


def anchors(name):
    """The anchors that GitHub gives to the headings of a document."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", prose(name), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        if anchor in found:
            pytest.fail(f"{name} has two headings {heading!r}, which GitHub tells apart by numbers")
        found.add(anchor)
    return found


def broken_links(name):
    """The links of a document that lead nowhere in this repository."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists():
            broken.append(target)
        elif anchor and anchor not in anchors(file.resolve().relative_to(ROOT).as_posix()):
            broken.append(target)
    return broken


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    assert broken_links(name) == []


@pytest.mark.parametrize("name", NAMES)
def test_paths_that_are_named_exist(name):
    pattern = r"(?<![\w/.])(?:kn_detectron|tests|tools|docs|configs|requirements)/[\w./-]*\w"
    inline = re.findall(r"`([^`]+)`", prose(name))
    paths = {path for code in inline for path in re.findall(pattern, code)}
    paths = {path for path in paths if "NAME" not in path}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_the_readme_is_one_page():
    assert len(read("README.md").splitlines()) <= 130


@pytest.mark.parametrize("name", NAMES)
def test_no_line_is_too_long(name):
    lines = enumerate(read(name).splitlines(), 1)
    # A row of a table, or what has no space to break it at, may be longer.
    too_long = [(n, line) for n, line in lines if len(line) > 120 and " " in line.strip()[:120]]
    assert [n for n, line in too_long if not line.startswith("|")] == []


def all_commands():
    return [
        (name, words)
        for name in NAMES
        for block in blocks(name)
        if block.language in ("", "sh")
        for words in commands(block.code)
    ]


def test_targets_of_make_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {words[1] for _, words in all_commands() if words[0] == "make"}
    assert {"demo", "test", "bench"} <= used <= targets


class _Parsed(Exception):
    """Carries what a tool's parser found, past the tool's work."""


def parse(words, monkeypatch):
    """The arguments of a command, parsed by the tool's own parser."""
    for method in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, method)

        def stop(self, *args, original=original, **options):
            raise _Parsed(original(self, *args, **options))

        monkeypatch.setattr(argparse.ArgumentParser, method, stop)
    monkeypatch.setattr(sys, "argv", [words[0], *words[1:]])
    with pytest.raises(_Parsed) as found:
        runpy.run_path(str(ROOT / words[0]))["main"]()
    return found.value.args[0]


def tools():
    """The commands of the repository: what begins as a script does."""
    paths = sorted((ROOT / "tools").rglob("*.py"))
    return [path for path in paths if path.read_text(encoding="utf-8").startswith("#!")]


def examples(path):
    """The examples in the docstring of a tool, which its --help shows."""
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    indented = re.sub(r"^    ", "", re.split("Examples?:\n", about)[-1], flags=re.MULTILINE)
    return [words[1:] for words in commands(indented)]


_TOOLS = [
    pytest.param(words[1:], id=f"{name}: {' '.join(words[1:])[:60]}")
    for name, words in all_commands()
    if words[:1] == ["python"] and words[1].startswith("tools/") and "--help" not in words
] + [pytest.param(words, id=" ".join(words)) for path in tools() for words in examples(path)]


@pytest.mark.parametrize("words", _TOOLS)
def test_tools_take_the_arguments(words, monkeypatch):
    args = parse(words, monkeypatch)
    assert [w for w in words if w.startswith("configs/") and not (ROOT / w).is_file()] == []
    config = getattr(args, "config_file", "")
    if config.startswith("configs/"):
        args.config_file = str(ROOT / config)
        read_config(args, add_pretraining_config)  # refuses a wrong key or value


@pytest.mark.parametrize("path", tools(), ids=lambda path: path.name)
def test_help_shows_an_example(path, monkeypatch, capsys):
    name = path.relative_to(ROOT).as_posix()
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path))["main"]()
    shown = capsys.readouterr().out
    assert ended.value.code == 0
    assert examples(path) and f"    python {name} " in shown + " "


def test_training_without_arguments_says_what_to_do_first(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tools/train_net.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / "train_net.py"), run_name="__main__")
    (said,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 1 and "--config" in said
    (config,) = re.findall(r"configs/\S+\.yaml", said)
    assert (ROOT / config).is_file()


# The block that takes what the commands of its page leave runs behind them, in another test.
_PREDICT = "load_run"


def python_blocks():
    return [
        pytest.param(name, block.code, id=f"{name}:{block.line}")
        for name in NAMES
        for block in blocks(name)
        if block.language == "python" and _PREDICT not in block.code
    ]


def write_readme_config(folder):
    """The config that README shows, with the full path of detectron2's, as it says."""
    (block,) = [block for block in blocks("README.md") if block.language == "yaml"]
    base = "mask_rcnn_R_50_C4_1x.yaml"
    path = detectron2_configs() / "COCO-InstanceSegmentation" / base
    assert f'_BASE_: "{base}"' in block.code
    (folder / "my_config.yaml").write_text(block.code.replace(base, str(path)))


@pytest.mark.parametrize("name, code", python_blocks())
def test_code_imports_this_package_first(name, code):
    # It mends what keeps an old detectron2 from being imported. In this process that has been done.
    imported = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    if "detectron2" in imported:
        assert "kn_detectron" in imported[: imported.index("detectron2")]


@pytest.mark.parametrize("name, code", python_blocks())
def test_code_runs(name, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_readme_config(tmp_path)
    # Where detectron2's setup.py puts a link to them, which a clone does not have.
    for module in (model_zoo, model_zoo.model_zoo):
        monkeypatch.setattr(
            module, "get_config_file", lambda name: f"{detectron2_configs()}/{name}"
        )
    try:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
    except ModuleNotFoundError as error:
        # As the page says: detectron2.export of old versions needs what torch no longer has.
        if error.name != "caffe2" or "detectron2.export" not in code:
            raise


def test_the_readmes_config_has_kn_in_all_norms(tmp_path):
    write_readme_config(tmp_path)
    args = argparse.Namespace(config_file=str(tmp_path / "my_config.yaml"), opts=[])
    cfg = read_config(args)
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    layers = kalman_layers(build_model(cfg))
    # FREEZE_AT 2 freezes 11 of 53.
    assert len(layers) == 42 and not any(layer.is_head for layer in layers.values())


def test_the_table_of_keys_is_complete():
    cfg = get_cfg()
    kn_detectron.add_kn_config(cfg)
    rows = re.findall(r"^\| `([A-Z_]+)` \| `([^`]+)` \|", read("docs/config.md"), re.MULTILINE)
    assert {key: eval(value) for key, value in rows} == dict(cfg.MODEL.KN)
