"""What NVFlare builds at the server of a job."""

from typing import Any

from nvflare.collab import collab

from halfpass.commands.engine import run_to_report
from halfpass.config import Config
from halfpass.nvflare.exchange import CollabExchange
from halfpass.nvflare.settings import config_of
from halfpass.run.round_server import serve_rounds


class Server:
    """One run, to its folder. Whatever it raises ends the job with an error."""

    def __init__(self, settings: dict[str, Any], sites: list[str]) -> None:
        """`settings`: by dotted name; `sites`: that of client 0, of client 1, and so on."""
        self.settings, self.sites = settings, sites

    @collab.main
    def train(self) -> None:
        def serve(config: Config) -> None:
            sites = {self.sites.index(site.name): site for site in collab.clients if site.name in self.sites}
            exchange = CollabExchange(sites, config.wire.reconnect, collab.context.is_aborted)
            try:
                serve_rounds(config, exchange, "nvflare")
            finally:
                exchange.close()

        run_to_report(lambda: config_of(self.settings, collab.fl_ctx.get_job_id()), serve)
