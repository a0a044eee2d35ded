"""What the documentation says can be done: the site builds, links lead somewhere, examples run as they are typed.

Every block of code in the pages is a fence with a language. `shell` and `python` blocks of a page run one after the
other in an empty folder; a Python block that begins with `# NAME.py` is written to that file. A comment before a block
says what else is to happen with it, and readers of the site and of GitHub do not see it:

    <!-- not run: REASON -->          its commands' options are looked at, and no more
    <!-- runs beside the next -->     it is started, and waited for behind the next block
    <!-- fails with 2 -->             its exit status
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from commands import Command, start
from markdown_it import MarkdownIt

import halfpass
from halfpass import config
from halfpass.commands import cli
from halfpass.commands.cli import main
from halfpass.errors import HalfpassError

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks/README.md", ROOT / "results/README.md",
    *sorted(ROOT.glob("examples/*/README.md")),
    *sorted(page for page in DOCS.rglob("*.md") if page.relative_to(DOCS).parts[0] not in ("_build", "notes")),
]  # fmt: skip
HOSTS = {"arxiv.org", "flower.ai", "github.com"}  # what pages link to elsewhere; nothing is fetched
SHELL = ("shell", "sh", "bash", "console")
SECONDS = 120  # for one command


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def tokens(page):
    return MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8"))


@dataclass
class Block:
    """A block of code in a page, and what the comment before it says."""

    page: Path
    line: int  # from 1
    language: str
    text: str
    marker: str  # "" where there is none

    def __str__(self):
        return f"{name_of(self.page)}:{self.line}"

    @property
    def runs(self):
        return self.language in (*SHELL, "python") and not self.marker.startswith("not run: ")

    @property
    def commands(self):
        """Its commands, each a list of words; what the shell itself understands stands between them."""
        if self.language == "python":
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        if self.language == "console":
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        return [command for line in lines for command in commands_in(line)]


def words_of(line):
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split = True
    return [word for word in lexer if word not in ("…", "...")]


def commands_in(line):
    found = [[]]
    for word in words_of(line):
        found = [*found, []] if set(word) <= set("|&;") else [*found[:-1], [*found[-1], word]]
    return [words for words in found if words]


def blocks(page):
    found, marker = [], ""
    for token in tokens(page):
        if token.type in ("fence", "code_block"):
            found.append(Block(page, token.map[0] + 1, token.info.strip(), token.content, marker))
        comment = re.fullmatch(r"<!-- (.*?) -->", token.content.strip()) if token.type == "html_block" else None
        marker = comment[1] if comment else ""
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_its_language_and_its_comment_is_known(block):
    assert block.language, "expected ```LANGUAGE before the code, found none, or an indented block"
    if block.language in (*SHELL, "python") and block.marker:
        assert re.fullmatch(r"not run: .{5,}|runs beside the next|fails with \d+", block.marker)


# --------------------------------------------------------------------------------------------- what commands may say


def parse_options(words):
    """The options of a halfpass command, looked at as the command does, but for files that are not there."""
    words, with_file = [word for word in words if word != "--print_config"], "--config" in words
    if with_file:
        at = words.index("--config")
        words = [*words[:at], *words[at + 2 :]]
    if {"--help", "-h", "--version"} & set(words):
        return
    if with_file or words[0] == "retrain":
        parser, _ = cli._parser(words[0], with_help=False)
        parser.parse_args([cli._spelled_out(word) for word in words])
    else:
        cli._parse(words)


def check(words):
    """Raises where a command names an option, a file, a target or an extra that there is not."""
    words = words[: words.index(">")] if ">" in words else words
    words = words[1:] if re.fullmatch(r"[A-Z_]+=.*", words[0]) else words
    program = words[0].rpartition("/")[2]
    if program in ("python", "python3", "torchrun") and "halfpass" in words and words[words.index("halfpass") - 1] == "-m":
        parse_options(words[words.index("halfpass") + 1 :])
    elif program == "halfpass":
        parse_options(words[1:])
    elif program in ("python", "python3") and len(words) > 1 and words[1].endswith(".py") and words[1].startswith(("benchmarks/", "examples/", "docs/")):
        source = (ROOT / words[1]).read_text()
        for option in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
            assert f'"{option}"' in source, f"{words[1]} has no {option}"
    elif program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
    elif program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            if extras := re.fullmatch(r"(?:\.|halfpass)\[(.*)\]", word):
                assert set(extras[1].split(",")) <= known.keys()


LOOKED_AT = [block for block in BLOCKS if block.language in SHELL and not block.marker.startswith("fails with ")]


@pytest.mark.parametrize("block", LOOKED_AT, ids=str)
def test_options_are_those_that_commands_have(block):
    for words in block.commands:
        try:
            check(words)
        except (HalfpassError, argparse.ArgumentError, SystemExit) as error:
            pytest.fail(f"{block}: {shlex.join(words)}: {error}")


def test_a_renamed_option_or_file_is_found_out():
    check(["halfpass", "train", "--train.epochs", "3", "--config", "no-such.yaml", ">", "out"])
    for words in (
        ["halfpass", "train", "--train.epoch", "3"], ["halfpass", "train", "--config", "x.yaml", "--train.epoch", "3"],
        ["halfpass", "trane"], ["torchrun", "--standalone", "-m", "halfpass", "serve", "--bond", "x"],
        ["halfpass", "retrain", "runs/x", "--train.ir", "1"], ["python", "benchmarks/step.py", "--no-such"],
        ["python", "benchmarks/no_such.py"], ["make", "nothing"], ["pip", "install", ".[nothing]"],
    ):  # fmt: skip
        with pytest.raises((HalfpassError, argparse.ArgumentError, AssertionError, FileNotFoundError, SystemExit)):
            check(words)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_that_a_page_names_are_there(page):
    known = config.flatten(config.as_dict(config.Config()))
    groups = "|".join(sorted({name.partition(".")[0] for name in known if "." in name}))
    named = set(re.findall(rf"(?:`|--)((?:{groups})\.[a-z_0-9]+)(?![a-z_0-9./*(])", page.read_text(encoding="utf-8")))
    files = {name for name in named if name.rpartition(".")[2] in ("py", "pem", "json", "jsonl", "yaml", "safetensors", "csv", "token")}
    assert not {name for name in named - files if name not in known}


# ------------------------------------------------------------------------------------------------- examples that run


def run_command(words, folder):
    """The exit status of one command, and what it said of errors; `cd` is left to the caller."""
    out = folder / words[words.index(">") + 1] if ">" in words else folder / "printed"
    words = words[: words.index(">")] if ">" in words else words
    with out.open("w") as printed, (folder / "said").open("w+") as said:
        if words[0] == "halfpass":
            status = start(words[1:], folder, printed.fileno(), said.fileno()).wait(SECONDS)
        else:
            ours = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # this Python, and what is installed beside it
            made = {"cwd": folder, "stdout": printed, "stderr": said, "env": {**os.environ, "PATH": ours}}
            status = subprocess.run(words, **made, timeout=SECONDS, check=False).returncode
        said.seek(0)
        return status, said.read()


def run_shell(block, folder):
    """Runs the block's commands; the folder in which the next is to run."""
    expected = int(block.marker.removeprefix("fails with ")) if block.marker.startswith("fails with ") else 0
    for words in block.commands:
        if words[0] == "cd":
            folder = folder / words[1]
            continue
        status, said = run_command(words, folder)
        assert status == expected, f"{block}: {shlex.join(words)}: expected exit status {expected}, found {status}: {said}"
    return folder


def run_python(block, names, folder):
    if file := re.match(r"# ([\w.-]+\.py)\n", block.text):
        (folder / file[1]).write_text(block.text)
    else:
        with contextlib.chdir(folder):
            exec(compile(block.text, str(block), "exec"), names)


def run_blocks(page, folder):
    """All blocks of a page that run, in their order; the names that the Python in it made."""
    names, beside = {"__name__": "__main__"}, []
    for block in (block for block in blocks(page) if block.runs):
        if block.language == "python":
            run_python(block, names, folder)
        elif block.marker == "runs beside the next":
            beside += [(block, Command(words[1:], folder)) for words in block.commands]
            continue
        else:
            folder = run_shell(block, folder)
        for earlier, process in beside:
            _, errors = process.communicate(SECONDS)
            assert process.returncode == 0, f"{earlier}: {errors}"
        beside = []
    assert not beside, "expected a block behind the one that runs beside the next, found none"
    return names


@pytest.mark.parametrize("page", dict.fromkeys(block.page for block in BLOCKS if block.runs), ids=name_of)
def test_examples_run_as_typed(page, tmp_path):
    names = run_blocks(page, tmp_path)
    if page == DOCS / "reference/library.md":
        up = names["wire"].meter.up
        assert (up["activations"], up["labels"]) == (32_944, 272)  # 256 samples of 32 values, in float32, with framing
        assert torch.isfinite(torch.tensor([names["local_loss"], names["loss"]])).all()
        for side in ("client", "server"):
            assert all(p.grad is not None for group in names[side].optimizer.param_groups for p in group["params"])
        assert names["result"]["epochs"] == 1


@pytest.mark.parametrize(
    "text",
    [
        "```shell\nhalfpass train --train.epochs 0 --out x\n```",
        "```shell\nls no-such-file\n```",
        "<!-- fails with 2 -->\n```shell\nls .\n```",
        "<!-- runs beside the next -->\n```shell\nhalfpass train --train.epochs 0\n```\n\n```shell\nls .\n```",
        "<!-- runs beside the next -->\n```shell\nhalfpass train --train.epochs 0\n```",
        "```python\nassert not 1\n```",
    ],
)
def test_an_example_that_fails_is_found_out(text, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError):
        run_blocks(tmp_path / "page.md", tmp_path)


def test_commands_run_one_behind_the_other_in_the_folder_that_cd_says(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    lines = "mkdir a  # a folder", "cd a", "touch b && touch \\", "    c", "ls > d"
    (tmp_path / "page.md").write_text("```shell\n" + "\n".join(lines) + "\n```\n\n```python\n# e.py\nx = 1\n```\n")
    run_blocks(tmp_path / "page.md", tmp_path)
    assert (tmp_path / "a/d").read_text().split() == ["b", "c", "d", "printed", "said"]
    assert (tmp_path / "a/e.py").read_text() == "# e.py\nx = 1\n"


def test_make_demo_compares_three_methods(tmp_path, monkeypatch, capsys):
    """The command of `make demo`, as the Makefile has it, but for its folder, and in fewer epochs."""
    command = re.search(r"\$\(BIN\)/halfpass (compare .*)", (ROOT / "Makefile").read_text())[1].split()
    monkeypatch.chdir(ROOT)
    assert main([*command, "--train.epochs", "5", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "demo" / "compare.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["decoupled", "conventional", "centralized"]
    decoupled, conventional, _ = rows
    assert all(row["test_accuracy"] >= 0.97 for row in rows), [row["test_accuracy"] for row in rows]
    assert decoupled["clients"] == 2
    assert decoupled["bytes"]["down"]["gradients"] == 0
    assert conventional["bytes"]["down"]["gradients"] == conventional["bytes"]["up"]["activations"]
    for method in ("decoupled", "conventional", "centralized"):
        assert method in said
    assert (tmp_path / "demo" / "report.html").stat().st_size > 50_000


# -------------------------------------------------------------------------------------------- links, names, the site


def inline(page):
    return [child for token in tokens(page) if token.type == "inline" for child in token.children or []]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found: list[str] = []
    all_tokens = tokens(page)
    for heading, text in itertools.pairwise(all_tokens):
        if heading.type == "heading_open":
            words = "".join(part.content for part in text.children if part.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.lower()).strip().replace(" ", "-")
            found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


def dead_links(page):
    """Links of a page to what is not there, or elsewhere than it is known to."""
    for token in inline(page):
        target = str(token.attrs.get("href" if token.type == "link_open" else "src") or "")
        parts = urlsplit(target)
        if token.type not in ("link_open", "image") or not target:
            continue
        if parts.scheme:
            if parts.scheme != "https" or parts.hostname not in HOSTS:
                yield target
            continue
        file = (page.parent / parts.path) if parts.path else page
        if not file.exists() or (parts.fragment and parts.fragment not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert not list(dead_links(page))


def test_dead_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# A `b`: c?\n\n## Same\n\n## Same\n")
    page = tmp_path / "page.md"
    good = ["other.md", "other.md#a-b-c", "other.md#same-1", "#here", "https://arxiv.org/abs/1"]
    dead = ["gone.md", "other.md#same-2", "#there", "http://arxiv.org", "https://example.org/"]
    page.write_text("# Here\n\n" + "\n".join(f"[x]({link})" for link in [*good, *dead]) + "\n![p](gone.svg)\n")
    assert list(dead_links(page)) == [*dead, "gone.svg"]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_are_there(page):
    named = [token.content for token in inline(page) if token.type == "code_inline"]
    ours = [name for name in named if re.fullmatch(r"(benchmarks|docs|examples|findings|halfpass|results|tests)/[\w./-]+\.[a-z]+", name)]
    assert not [name for name in ours if not (ROOT / name).exists()]


def test_settings_and_commands_are_those_of_the_code(capsys):
    generate = runpy.run_path(str(DOCS / "generate.py"))
    assert generate["main"](["--check"]) == 0, capsys.readouterr().err
    options, commands = ((DOCS / "reference" / name).read_text() for name in ("options.md", "commands.md"))
    for name in config.flatten(config.as_dict(config.Config())):
        assert f"\n| `{name}` | " in options
    assert [f"## {name}" in commands for name in cli.COMMANDS] == [True] * len(cli.COMMANDS)


def test_the_library_page_has_every_public_name():
    text = (DOCS / "reference" / "library.md").read_text()
    directives = set(re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.MULTILINE))
    settings = {name for name in halfpass.__all__ if name.endswith("Config")}
    assert directives | settings | {"client_steps", "server_steps"} == set(halfpass.__all__)
    assert all(f"`{name}`" in text for name in settings)
    for steps in (halfpass.client_steps, halfpass.server_steps):
        assert f".. automodule:: {steps.__name__}\n" in text


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx", reason="the extra `docs`")
    words = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-d", tmp_path / "trees"]
    built = subprocess.run([*words, DOCS, tmp_path / "site"], capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stderr
    for page in (page.relative_to(DOCS).with_suffix(".html") for page in PAGES if DOCS in page.parents):
        assert (tmp_path / "site" / page).is_file(), page


def test_the_table_in_short_is_four_measures_of_each_run():
    """Of a results file made here: bytes both ways, in GB, memory of the client, minutes."""
    row = {
        "method": "decoupled", "test_accuracy": 0.876, "train_seconds": 90,
        "bytes": {"socket_up": 2_000_000_000, "socket_down": 400_000_000},
        "peak_memory_bytes": {"client": [1_000_000, 3_000_000]},
    }  # fmt: skip
    other = row | {"method": "conventional", "test_accuracy": 0.9}
    short = runpy.run_path(str(ROOT / "benchmarks/tables.py"))["short_markdown"]
    assert short({"rows": [row, other]}).splitlines() == [
        "|  | decoupled | conventional |",
        "| --- | ---: | ---: |",
        "| test accuracy | 87.6 % | 90.0 % |",
        "| bytes on the wire | 2.4 GB | 2.4 GB |",
        "| peak memory of the client | 3 MB | 3 MB |",
        "| training time | 1.5 min | 1.5 min |",
    ]
