"""What NVFlare builds at the server of a job."""

import logging
from typing import Any

from nvflare.collab import collab

from halfpass.nvflare.exchange import CollabExchange
from halfpass.nvflare.settings import config_of
from halfpass.report.page import write_report
from halfpass.run import logs
from halfpass.run.round_server import serve_rounds

LOG = logging.getLogger("halfpass")


class Server:
    """One run, to its folder. Whatever it raises ends the job with an error."""

    def __init__(self, settings: dict[str, Any], sites: list[str]) -> None:
        """`settings`: by dotted name; `sites`: that of client 0, of client 1, and so on."""
        self.settings, self.sites = settings, sites

    @collab.main
    def train(self) -> None:
        try:
            config = config_of(self.settings, collab.fl_ctx.get_job_id())
            logs.begin(config.log)
            sites = {self.sites.index(site.name): site for site in collab.clients if site.name in self.sites}
            exchange = CollabExchange(sites, config.wire.reconnect, collab.context.is_aborted)
            try:
                serve_rounds(config, exchange, "nvflare")
            finally:
                exchange.close()
            write_report([config.folder], config.folder / "report.html")
            LOG.info("done: %s", config.folder.absolute(), extra={"event": "done"})
        except BaseException as error:
            logs.say(str(error) or repr(error), logging.ERROR, event="failed")
            raise
