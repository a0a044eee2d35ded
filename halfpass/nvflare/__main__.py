"""`python -m halfpass.nvflare CONFIG`: a run on NVFlare, on this machine or, with --kit, in production.

Exit status: 0 done, 1 the run failed, 2 the settings were wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfpass.bounded import MOST_YAML_BYTES, parse_yaml, read_text
from halfpass.commands.arguments import check_config
from halfpass.commands.grid import read_pairs
from halfpass.config import Config, as_dict, flatten
from halfpass.errors import HalfpassError, InputError


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m halfpass.nvflare", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, as for halfpass train.")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="Other settings, such as train.epochs=2.")
    which = "Sites of client 0, of client 1 and so on, with commas. Default: site-1,site-2 and so on."
    parser.add_argument("--sites", default="", help=which)
    own = "Python file or folder that data.name, model.name or task.name come from; it travels with the job."
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help=own)
    parser.add_argument("--kit", type=Path, help="An admin's startup kit: gives the job to that server.")
    options = parser.parse_intermixed_args(words)
    try:
        settings = _settings(options.config, options.settings)
        sites = [name.strip() for name in options.sites.split(",")] if options.sites else []
        _run(settings, sites, options.file, options.kit)
    except HalfpassError as error:
        print(f"halfpass: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def _settings(file: Path, pairs: Sequence[str]) -> dict[str, Any]:
    check_config(file, list(flatten(as_dict(Config()))))
    return flatten(parse_yaml(read_text(file, MOST_YAML_BYTES))) | read_pairs("settings", pairs)


def _run(settings: dict[str, Any], sites: Sequence[str], files: Sequence[str], kit: Path | None) -> None:
    try:
        from halfpass.nvflare.job import simulate, submit
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "nvflare":
            raise
        raise InputError("nvflare", "NVFlare", "none", "pip install 'halfpass[nvflare]'") from None
    if kit is None:
        print(f"done: {simulate(settings, sites, files)}")
    else:
        submit(kit, settings, sites, files)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
