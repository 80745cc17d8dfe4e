"""README and documentation: commands are parsed by the commands themselves, links lead somewhere, Python runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from live import PATIENCE_SECONDS

from megatron_tf.__main__ import COMMANDS, find
from megatron_tf.config.yaml_core import parse_yaml

PROJECT = Path(__file__).parents[1]
PAGES = sorted([*(PROJECT / "docs").rglob("*.md"), *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md"))])
IDS = [str(page.relative_to(PROJECT)) for page in PAGES]
BY_MODULE = {command.module: name for name, command in COMMANDS.items()}
# Commands of other programs, also where our name stands among their words.
OTHERS = ("pip", "docker", "curl", "lm_eval", "scancel", "pytest", "zstdcat", "nvidia-cuda-mps-control")
WITH_ARGUMENTS = r"((python|sbatch) \S+|make) \S"  # in running text a script alone is only its name
WITHOUT_DEEPSPEED = """
import sys
class Away:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Away())
"""


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = load(PROJECT / "docs" / "hooks.py")
parser_of = cache(hooks.parser_of)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> Iterator[list[str]]:
    """The commands of a page's shell blocks, and the whole ones in its running text, as words."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose) if re.match(WITH_ARGUMENTS, code)]
    for line in lines:
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # variables of the environment
                del words[0]
            if words:
                yield words[: words.index(">")] if ">" in words else words


def own_command(words: list[str]) -> tuple[str, list[str]] | None:
    """(name, arguments) of our command in the words of a line; None for a command of another program."""
    for index, word in enumerate(words):
        script = re.fullmatch(r"(?:launch|tools)/(\w+)\.py", word)
        if script:
            return BY_MODULE[script[1]], words[index + 1 :]
        if word == "megatron_tf" and words[0] not in OTHERS:
            found = find(words[index + 1 :])
            assert found is not None or words[index + 1 :] == ["--help"], words
            return (found[0], list(found[1])) if found else None
        if word == "launch/slurm/train.sbatch":
            return "train", words[index + 1 :]
    return None


def parse(name: str, arguments: list[str]) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parser = parser_of(COMMANDS[name].module)
            if any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
                parser.parse_args(arguments)
            else:
                parser.parse_intermixed_args(arguments)
    except SystemExit as error:
        assert error.code in (0, None), f"{name} {shlex.join(arguments)}: {said.getvalue()}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_is_parsed(page):
    targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    for words in commands_of(page):
        own = own_command(words)
        if own is not None:
            parse(*own)
            files = [word for word in words if word.startswith(("configs/", "launch/", "tools/"))]
            assert [file for file in files if not (PROJECT / file).exists()] == []
        elif words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "python":
            assert words[1] == "-m" or (PROJECT / words[1]).exists(), words
        else:
            assert words[0] in OTHERS or words[0] == "megatron_tf", words


def test_commands_that_do_not_exist_are_seen():
    assert own_command(["deepspeed", "launch/train.py", "configs/tiny.yml"]) == ("train", ["configs/tiny.yml"])
    with pytest.raises(AssertionError, match="unrecognized arguments: --gpu-count"):
        parse("plan", ["configs/tiny.yml", "--gpus", "3", "--gpu-count", "3"])
    with pytest.raises(AssertionError):
        own_command(["megatron_tf", "trian", "tiny"])


def test_most_commands_are_ours():
    own = [words for page in PAGES for words in commands_of(page) if own_command(words)]
    assert len(own) > 80
    assert {own_command(words)[0] for words in own} >= {*COMMANDS} - {"build-demo-corpus", "demo", "train-tokenizer"}


def plans() -> list[list[str]]:
    found = [own_command(words) for page in PAGES for words in commands_of(page)]
    return [list(words) for words in sorted({tuple(own[1]) for own in found if own and own[0] == "plan"})]


@pytest.mark.parametrize("arguments", plans(), ids=" ".join)
def test_the_plans_run(arguments, monkeypatch, capsys, tmp_path):
    """What a study has found is there when it has run."""
    from megatron_tf.commands import plan_run

    (tmp_path / "results.json").write_text('{"laws": {"tokenformer": {"missing": "few runs"}}, "arms": []}')
    places = [str(tmp_path / "results.json") if word.endswith("/results.json") else word for word in arguments]
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("sys.argv", ["plan", *places])
    with contextlib.suppress(SystemExit):  # a layout that does not fit is an answer too
        plan_run.main()
    assert "memory" in capsys.readouterr().out


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as mkdocs and GitHub make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_navigation():
    text = (PROJECT / "mkdocs.yml").read_text(encoding="utf-8")
    docs = {str(page.relative_to(PROJECT / "docs")) for page in PAGES if page.is_relative_to(PROJECT / "docs")}
    assert set(re.findall(r": ([\w/]+\.md)$", text, re.MULTILINE)) == docs


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_yaml_and_python_are_whole(page):
    for block in blocks(page, "yaml"):
        assert parse_yaml(block, str(page))[1] == []
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pytest.mark.parametrize("name", sorted(hooks.GENERATORS))
def test_generated_pages(name):
    marker = f"<!-- generated: {name} -->"
    assert [page for page in PAGES if marker in page.read_text(encoding="utf-8")] != []
    text = hooks.on_page_markdown(f"before\n{marker}\nafter")
    assert text.startswith("before\n") and text.endswith("\nafter") and len(text) > 500 and "generated" not in text[:80]


def test_the_reference_of_commands_has_each_of_them_and_their_modes():
    text = hooks.commands()
    for name in COMMANDS:
        assert f"## `megatron_tf {name}`" in text and f"usage: megatron_tf {name} " in text
    assert "usage: megatron_tf convert to-hf " in text and "usage: megatron_tf benchmark step " in text


def test_the_pictures_are_those_of_their_script():
    draw = load(PROJECT / "docs" / "pictures" / "draw.py")
    for name, (width, height, parts) in draw.PICTURES.items():
        drawn = draw.picture(width, height, parts())
        assert (PROJECT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == drawn


def test_the_readme_is_short_and_tells_what_ci_runs():
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 125
    assert "\nmake test-all " in readme and "\nmake test-all\n" in (PROJECT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_plain_torch_loop_trains_without_deepspeed():
    (loop,) = [block for block in blocks(PROJECT / "docs/guides/own_loop.md", "python") if "loss.backward()" in block]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED + "import torch; torch.manual_seed(0)\n" + loop],
        cwd=PROJECT, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 2, done.stdout


def test_the_page_of_the_architecture_names_every_room_and_files_that_are_there():
    page = (PROJECT / "docs" / "design" / "architecture.md").read_text(encoding="utf-8")
    package = PROJECT / "megatron_tf"
    rooms = {f"`{folder.name}/`" for folder in package.iterdir() if (folder / "__init__.py").exists()}
    assert {room for room in rooms if f"| {room}" not in page} == set()
    named = re.findall(r"`([a-z_/]+/[a-z_]*(?:\.py)?)`", page.partition("## What a change touches")[2])
    assert len(named) > 40
    assert [path for path in named if not (package / path).exists() and not (PROJECT / path).exists()] == []
