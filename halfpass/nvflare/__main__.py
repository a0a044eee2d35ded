"""`python -m halfpass.nvflare CONFIG`: a run on NVFlare, on this machine or, with --kit, in production.

Exit status: 0 done, 1 the run failed, 2 the settings were wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfpass.bounded import MOST_YAML_BYTES, parse_json, parse_yaml, read_text
from halfpass.commands.arguments import check_config
from halfpass.commands.grid import read_pairs
from halfpass.config import Config, as_dict, flatten
from halfpass.errors import HalfpassError, InputError
from halfpass.files import write_json
from halfpass.nvflare.settings import CLASSES


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("python -m halfpass.nvflare", description=__doc__, allow_abbrev=False)
    parser.add_argument("config", type=Path, nargs="?", metavar="CONFIG", help="YAML file, as for halfpass train.")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="Other settings, such as train.epochs=2.")
    which = "Sites of client 0, of client 1 and so on, with commas. Default: site-1,site-2 and so on."
    parser.add_argument("--sites", default="", help=which)
    own = "Python file or folder that data.name, model.name or task.name come from; it travels with the job."
    parser.add_argument("--file", action="append", default=[], metavar="FILE", help=own)
    parser.add_argument("--kit", type=Path, help="An admin's startup kit: gives the job to that server.")
    allowing = "Has a server or site with that startup kit build what jobs of halfpass are made of, and does no more."
    parser.add_argument("--allow", type=Path, metavar="KIT", help=allowing)
    options = parser.parse_intermixed_args(words)
    if (options.config is None) == (options.allow is None):
        parser.error("give CONFIG, or --allow KIT alone")
    try:
        if options.allow is not None:
            print(f"wrote {allow(options.allow)}")
            return 0
        settings = _settings(options.config, options.settings)
        sites = [name.strip() for name in options.sites.split(",")] if options.sites else []
        _run(settings, sites, options.file, options.kit)
    except HalfpassError as error:
        print(f"halfpass: {error}", file=sys.stderr)
        return error.exit_status
    return 0


def allow(kit: Path) -> Path:
    """Adds halfpass to the classes that the server or site of that startup kit may build; returns the file that says
    so. Raises InputError where it is no such kit."""
    local = kit / "local"
    own, default = local / "resources.json", local / "resources.json.default"
    try:
        said = parse_json(read_text(own if own.exists() else default, MOST_YAML_BYTES))
        known = said["class_allow_list"]
        said["class_allow_list"] = [*known, *(name for name in CLASSES if name not in known)]
    except (OSError, ValueError, KeyError, TypeError):
        remedy = "give the folder that was made for a server or a site, with startup and local in it"
        raise InputError("--allow", "the startup kit of a server or a site", f"none in {kit}", remedy) from None
    write_json(own, said)
    return own


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
