"""What Flower starts beside a SuperLink: `serverapp = "halfpass.flower.server_app:app"`."""

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from halfpass.flower.exchange import FlowerExchange
from halfpass.flower.settings import config_of
from halfpass.report.page import write_report
from halfpass.run import logs
from halfpass.run.round_server import serve_rounds

LOG = logging.getLogger("halfpass")
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, to its folder. Whatever raises here is the end of the Flower run, with status failed."""
    try:
        config = config_of(context.run_config, context.run_id)
        logs.begin(config.log)
        exchange = FlowerExchange(grid, config.clients.count, config.wire.reconnect)
        try:
            serve_rounds(config, exchange, "flower")
        finally:
            exchange.close()
        write_report([config.folder], config.folder / "report.html")
        LOG.info("done: %s", config.folder, extra={"event": "done"})
    except BaseException as error:
        logs.say(str(error) or repr(error), logging.ERROR, event="failed")
        raise
