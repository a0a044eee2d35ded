"""A job of NVFlare's, made of halfpass's settings: simulated on this machine, or given to a server in production."""

import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from nvflare.apis.job_def import RunStatus
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.collab import CollabRecipe
from nvflare.fuel.flare_api.flare_api import new_secure_session
from nvflare.recipe import SimEnv

from halfpass.bounded import MOST_YAML_BYTES, read_text
from halfpass.errors import InputError, RunError
from halfpass.nvflare.client import Client
from halfpass.nvflare.server import Server
from halfpass.nvflare.settings import CLASSES, config_of, sites_of
from halfpass.run import logs
from halfpass.run.records import default_folder

NAME = "halfpass"
LOGIN_SECONDS = 20.0
PATHS = ("data.path", "model.weights", "server.store")  # which simulated sites would look for elsewhere


class _Recipe(CollabRecipe):
    """NVFlare's, but none of halfpass's code travels: it is installed at every site."""

    @staticmethod
    def _user_source_entries(objs: Collection[object]) -> list[Any]:
        return []


def recipe(settings: Mapping[str, object], sites: Sequence[str] = (), files: Sequence[str] = ()) -> CollabRecipe:
    """The job. `settings`: by dotted name; `sites`: of client 0, of client 1, and so on, site-1, site-2 and so on if
    none is named; `files`: a user's own code, which travels with it. Raises InputError for what cannot be used."""
    sites = sites_of(sites, config_of(settings, "0").clients.count)
    made = _Recipe(
        NAME, Server(dict(settings), sites), Client(dict(settings)), min_clients=len(sites),
        max_inbound_call_threads_for_client=1,
    )  # fmt: skip
    made.set_per_site_config({site: {"client": number} for number, site in enumerate(sites)})
    for file in files:
        if not Path(file).exists():
            raise InputError("files", "code to send along", f"none at {file}", "check the path")
        made.add_server_file(file)
        made.add_client_file(file)
    made.finalize().set_app_packages(["halfpass"])
    return made


def simulate(settings: Mapping[str, object], sites: Sequence[str] = (), files: Sequence[str] = ()) -> Path:
    """A server process and one process per site, on this machine; returns the run folder. Raises InputError for what
    cannot be used, and RunError where the job failed."""
    config = config_of(settings, "0")
    out = str((config.folder if settings.get("out") else Path(default_folder(config))).absolute())
    with tempfile.TemporaryDirectory(prefix="halfpass-nvflare-") as folder:
        local = Path(folder) / NAME / "local"
        local.mkdir(parents=True)
        allowed = {"format_version": 2, "class_allow_list": [*DEFAULT_CLASS_ALLOW_LIST, *CLASSES]}
        (local / "resources.json.default").write_text(json.dumps(allowed))
        here = {name: str(Path(path).absolute()) for name in PATHS if isinstance(path := settings.get(name), str)}
        made = recipe({**settings, **here, "out": out}, sites, files)
        before = os.environ.get("PYTHONPATH", "")
        folders = [str(Path(file).absolute().parent) for file in files]
        os.environ["PYTHONPATH"] = os.pathsep.join([*folders, before])  # where simulated sites look for them
        try:
            made.run(SimEnv(clients=made.configured_sites(), workspace_root=folder))
        except RuntimeError as error:
            raise RunError("the job", f"a finished run in {out}", str(error), "see what it said above") from error
        finally:
            os.environ["PYTHONPATH"] = before
    if not (Path(out) / "result.json").is_file():
        raise RunError("the job", f"a finished run in {out}", "no result.json", "see what it said above")
    return Path(out)


def submit(kit: Path, settings: Mapping[str, object], sites: Sequence[str] = (), files: Sequence[str] = ()) -> None:
    """Gives the job to the server of the admin's startup kit, and waits for its end. Raises InputError for what cannot
    be used or where a site is not there, and RunError where the job failed."""
    made = recipe(settings, sites, files)
    wanted = made.configured_sites()
    with closing(_session(kit)) as session, tempfile.TemporaryDirectory(prefix="halfpass-nvflare-") as folder:
        there = {client.name for client in session.get_connected_client_list()}
        if not set(wanted) <= there:
            expected, found = f"{', '.join(wanted)} connected to the server", ", ".join(sorted(there)) or "none"
            raise InputError("sites", expected, found, "start them, or name others")
        made.export(folder)
        job = session.submit_job(f"{folder}/{NAME}")
        logs.say(f"job {job}; its run folder is at the server")
        try:
            status = session.wait_for_job(job)["status"]
        except KeyboardInterrupt:
            session.abort_job(job)
            raise
    if status != (completed := RunStatus.FINISHED_COMPLETED.value):
        raise RunError(f"job {job}", completed, status, "see its log at the server")


def _session(kit: Path) -> Any:
    file = kit / "startup" / "fed_admin.json"
    try:
        user = json.loads(read_text(file, MOST_YAML_BYTES))["admin"]["username"]
    except (OSError, ValueError, KeyError, TypeError):
        remedy = "give the folder that was made for an admin, with startup in it"
        raise InputError("kit", "an admin's startup kit", f"none in {kit}", remedy) from None
    try:
        return new_secure_session(user, str(kit), timeout=LOGIN_SECONDS)
    except Exception as error:  # NVFlare's have nothing in common
        found = f"{type(error).__name__}: {error}"
        raise RunError("NVFlare's server", f"to let {user} in", found, "see whether it runs, and its log") from error
