"""What an engine's server app does with a run: to its folder, with a report, or with the reason why not in its log.

Engines keep logs where users have to look for them; `events.jsonl` in the run folder has what halfpass said.
"""

import logging
from collections.abc import Callable

from halfpass.config import Config
from halfpass.report.page import write_report
from halfpass.run import logs

LOG = logging.getLogger("halfpass")


def run_to_report(settings: Callable[[], Config], serve: Callable[[Config], None]) -> None:
    """`settings` reads those of the run, `serve` carries it. Whatever they raise is raised, for the engine to see."""
    try:
        config = settings()
        logs.begin(config.log)
        with logs.kept_in(config.folder):
            serve(config)
            write_report([config.folder], config.folder / "report.html")
            LOG.info("done: %s", config.folder.absolute(), extra={"event": "done"})
    except BaseException as error:
        logs.say(str(error) or repr(error), logging.ERROR, event="failed")
        raise
