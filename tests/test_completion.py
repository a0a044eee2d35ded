"""`halfpass completion`: the script of each shell, run in the shells that this machine has."""

import shutil
import subprocess

import pytest

from halfpass.commands import cli
from halfpass.commands.completion import SHELLS, completion_script
from halfpass.config import Config, as_dict, flatten

TRY = """
source "$1"
try() {
  COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}; COMPREPLY=()
  _shtab_halfpass halfpass "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
  echo "$* => ${COMPREPLY[*]}"
}
complete -p halfpass
try halfpass tra
try halfpass train --train.ep
try halfpass serve --method ""
try halfpass train --model.name dig
try halfpass train --data.download ""
try halfpass cuts --aff
try halfpass train --tls.folder "$2/k"
try halfpass train --config "$2/r"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    parser, _ = cli._parser(None, with_help=True, whole=True)
    for shell in SHELLS:
        (folder / shell).write_text(completion_script(parser, shell))
    (folder / "keys").mkdir()
    (folder / "run.yaml").touch()
    return folder


def ran(*words):
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, env={"PATH": "/usr/bin:/bin", "HOME": "/", "TERM": "dumb"})
    assert done.stderr == ""
    return done.stdout


def test_bash_completes_commands_options_values_and_files(scripts):
    """Without halfpass on the path: completing starts no Python."""
    assert shutil.which("halfpass", path="/usr/bin:/bin") is None
    lines = ran("bash", "-c", TRY, "bash", scripts / "bash", scripts).splitlines()
    assert lines[0].endswith(" -F _shtab_halfpass halfpass")
    assert lines[1:] == [
        "halfpass tra => train",
        "halfpass train --train.ep => --train.epochs",
        "halfpass serve --method  => decoupled conventional centralized",
        "halfpass train --model.name dig => digits-cnn",
        "halfpass train --data.download  => true false",
        "halfpass cuts --aff => --afford",
        f"halfpass train --tls.folder {scripts}/k => {scripts}/keys",
        f"halfpass train --config {scripts}/r => {scripts}/run.yaml",
    ]


@pytest.mark.skipif(shutil.which("fish") is None, reason="no fish")
def test_fish_completes_and_says_what_it_is(scripts):
    said = ran("fish", "--no-config", "-c", f"source {scripts}/fish; complete -C 'halfpass train --train.ep'; complete -C 'halfpass serve --method co'")
    assert "--train.epochs\tPasses over the training set" in said
    assert "conventional" in said


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh")
def test_zsh_takes_the_script(scripts, tmp_path):
    (tmp_path / "_halfpass").write_text((scripts / "zsh").read_text())
    words = f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D; echo ${{_comps[halfpass]}}; autoload +X _halfpass"
    assert ran("zsh", "-fc", words).strip() == "_halfpass"


def test_every_option_of_every_command_is_in_each(scripts):
    for shell in SHELLS:
        text = (scripts / shell).read_text()
        for name in (*cli.COMMANDS, *flatten(as_dict(Config()))):
            assert name in text
        assert "--print_shtab" not in text


def test_another_shell_is_refused(capsys):
    assert cli.main(["completion", "ksh"]) == 2
    assert capsys.readouterr().err == "halfpass: SHELL: expected one of bash, zsh, fish, found 'ksh'; did you mean 'zsh'?\n"
