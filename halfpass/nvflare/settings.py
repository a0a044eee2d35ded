"""A job's settings as halfpass's own, and which site is which client."""

from collections.abc import Mapping, Sequence

from halfpass.config import Config
from halfpass.errors import InputError
from halfpass.run import round_settings
from halfpass.run.round_client import check_rounds_only

DEFAULT_OUT = "runs/nvflare-{job}"
CLASSES = ["halfpass.nvflare.", "nvflare.collab."]  # of which a job is made, as `class_allow_list` names them


def config_of(settings: Mapping[str, object], job: str) -> Config:
    """The settings, by dotted name, of the job with that number. Raises InputError for a key that halfpass does not
    know, which it names, and for a value that cannot be used."""
    config = round_settings.config_of(settings, "NVFlare", DEFAULT_OUT.format(job=job))
    check_rounds_only(config)
    return config


def sites_of(names: Sequence[str], clients: int) -> list[str]:
    """The site of client 0, of client 1, and so on: as they are named, or as simulations name them."""
    sites = list(names) or [f"site-{number}" for number in range(1, clients + 1)]
    if len(sites) != clients or len(set(sites)) != clients or not all(sites):
        expected = f"{clients} names of sites, one for each client"
        raise InputError("sites", expected, ", ".join(map(repr, sites)), "name them so, or change clients.count")
    return sites
