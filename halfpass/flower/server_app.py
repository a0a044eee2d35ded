"""What Flower starts beside a SuperLink: `serverapp = "halfpass.flower.server_app:app"`."""

from flwr.app import Context, MessageType
from flwr.serverapp import Grid, ServerApp

from halfpass.commands.engine import run_to_report
from halfpass.config import Config
from halfpass.flower.exchange import FlowerExchange
from halfpass.flower.settings import STREAM, config_of, stream_of
from halfpass.flower.stream import serve_streams
from halfpass.run.round_server import serve_rounds

ROUND = MessageType.TRAIN
STREAM_SECONDS = 30 * 24 * 3600.0  # for which Flower keeps the message that a client joins by
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, to its folder. Whatever raises here is the end of the Flower run, with status failed."""

    def serve(config: Config) -> None:
        address = stream_of(context.run_config)
        seconds, kind = (config.wire.reconnect, ROUND) if address is None else (STREAM_SECONDS, f"{ROUND}.{STREAM}")
        exchange = FlowerExchange(grid, config.clients.count, seconds, kind)
        try:
            if address is None:
                serve_rounds(config, exchange, "flower")
            else:
                serve_streams(config, address, exchange)
        finally:
            exchange.close()

    run_to_report(lambda: config_of(context.run_config, context.run_id), serve)
