"""`--help`: one screen first, and every option on some page."""

import re

import pytest

from halfpass.commands import cli, help
from halfpass.commands.cli import COMMANDS, main
from halfpass.config import Config, as_dict, flatten

LONG = ("train", "compare", "serve", "join", "agreement", "retrain", "check", "cuts")


def page(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", LONG)
def test_the_first_page_is_one_screen(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    said = page(capsys, command, "--help")
    lines = said.splitlines()
    assert len(lines) <= 40
    assert max(len(line) for line in lines if not line.startswith("    halfpass")) <= 80
    assert lines[0].strip() == help.EXAMPLES[command][0]
    for name in help.FIRST:
        assert f"\n  --{name} " in said
    assert f"halfpass {command} --help GROUP" in said


def test_every_option_is_on_the_page_of_its_group(capsys):
    options = flatten(as_dict(Config()))
    whole = page(capsys, "train", "--help", "all")
    assert all(f"--{name} " in whole for name in options)
    groups = {name.partition(".")[0] for name in options if "." in name}
    first = page(capsys, "train", "-h")
    for group in groups:
        assert f"\n  {group} " in first
    said = page(capsys, "train", "--help=wire")
    assert all((f"--{name} " in said) == name.startswith("wire.") for name in options)


def test_one_option_has_a_page(capsys):
    said = page(capsys, "train", "--train.epochs", "none", "--help", "train.lr")
    assert "the peak where the schedule varies it" in said
    assert "--train.epochs" not in said


@pytest.mark.parametrize(("topic", "said"), [
    ("wires", "--help: expected one of data, .*, all, found 'wires'; did you mean 'wire'?"),
    ("lr", "--help: expected one of data, .*, all, found 'lr'; did you mean 'train.lr'?"),
    ("zzz", "--help: expected one of data, .*, all, found 'zzz'; use one of those"),
])  # fmt: skip
def test_an_unknown_topic_is_refused(capsys, topic, said):
    assert main(["train", "--help", topic]) == 2
    start, end = said.split(".*")
    found = capsys.readouterr().err
    assert found.startswith(f"halfpass: {start}")
    assert found.endswith(f"{end}\n")


def test_every_command_has_an_example_whose_options_there_are(capsys):
    assert set(help.EXAMPLES) <= set(COMMANDS)
    for command, examples in help.EXAMPLES.items():
        _, parser = cli._parser(command, with_help=False)
        for example in examples:
            words = example.split()
            assert words[:2] == ["halfpass", command]
            assert {w for w in words if w.startswith("--")} <= set(cli._option_names(parser)), example
    said = page(capsys, "export", "--help")
    assert said.startswith(f"for example:\n    {help.EXAMPLES['export'][0]}\n")
    assert re.search(r"^  --with_head ", said, re.MULTILINE)
