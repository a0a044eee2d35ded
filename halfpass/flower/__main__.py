"""`python -m halfpass.flower APP`: `flwr run APP --stream`, with the settings checked first, and an exit status that
says how the run ended, which Flower's own does not.

Exit status: 0 done, 1 the run failed, 2 the settings were wrong.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from halfpass.bounded import MOST_YAML_BYTES, read_text
from halfpass.config import flatten
from halfpass.errors import HalfpassError, InputError, RunError
from halfpass.flower.settings import config_of, stream_of
from halfpass.run.round_client import check_rounds_only

USAGE = "python -m halfpass.flower APP [SUPERLINK] [options of flwr run]"


def main(words: Sequence[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(f"{(__doc__ or '').strip()}\n\n{USAGE}", file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    try:
        check_app(Path(words[0]), _overrides(words))
        return run(words)
    except HalfpassError as error:
        print(f"halfpass: {error}", file=sys.stderr)
        return error.exit_status


def check_app(folder: Path, overrides: list[str]) -> None:
    """Raises InputError where the app in that folder cannot be run as it is set."""
    try:
        import click
        from flwr.common.config import parse_config_args
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "flwr"):
            raise
        raise InputError("flwr", "Flower", "none", "pip install 'halfpass[flower]'") from None
    file = folder / "pyproject.toml"
    if not file.is_file():
        raise InputError("APP", "a folder with an app's pyproject.toml", f"none in {folder}", USAGE)
    try:
        settings = tomllib.loads(read_text(file, MOST_YAML_BYTES))["tool"]["flwr"]["app"].get("config", {})
        given = flatten(settings) | parse_config_args(overrides)
    except (OSError, ValueError, KeyError, AttributeError, click.ClickException) as error:
        found = " ".join(str(error).split())[:200]
        raise InputError(str(file), "TOML with [tool.flwr.app], and settings like it", found, USAGE) from None
    config = config_of(given, "0")
    if stream_of(given) is None:
        check_rounds_only(config)


def _overrides(words: Sequence[str]) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-c", "--run-config")]


def run(words: Sequence[str]) -> int:
    """Runs it to its end, which Flower is asked for."""
    flwr = shutil.which("flwr") or str(Path(sys.executable).with_name("flwr"))
    if not Path(flwr).is_file():
        raise InputError("flwr", "Flower's command", "none", "pip install 'halfpass[flower]'")
    started = subprocess.run([flwr, "run", *words, "--format", "json"], stdout=subprocess.PIPE, text=True)
    number = _number(started.stdout)
    if started.returncode or number is None:
        return 1
    where = words[1:2] if len(words) > 1 and not words[1].startswith("-") else []
    subprocess.run([flwr, "log", number, *where])
    return 0 if _status(flwr, number, where) == "finished:completed" else 1


def _number(said: str) -> str | None:
    try:
        found = json.loads(said)
        return str(found["run-id"]) if found.get("success") else None
    except (ValueError, KeyError, AttributeError):
        return None


def _status(flwr: str, number: str, where: Sequence[str]) -> str:
    asked = subprocess.run(
        [flwr, "list", "--run-id", number, *where, "--format", "json"], stdout=subprocess.PIPE, text=True
    )
    try:
        return str(json.loads(asked.stdout)["runs"][0]["status"])
    except (ValueError, KeyError, IndexError, TypeError):
        found = asked.stdout[:80] or "nothing"
        raise RunError("flwr list", f"the status of run {number}", found, "ask again") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
