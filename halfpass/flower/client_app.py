"""What Flower starts on each node: `clientapp = "halfpass.flower.client_app:app"`."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from halfpass.config import Config
from halfpass.errors import HalfpassError
from halfpass.flower.exchange import as_record, of_record
from halfpass.flower.settings import client_of, config_of
from halfpass.run import logs
from halfpass.run.round_client import RoundClient, refusal

app = ClientApp()
_newest: tuple[Config, RoundClient] | None = None  # a simulation's processes serve several clients, one after the other


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of the client whose number this node has."""
    data = of_record(message.content, "the server's message")
    try:
        client = _client(config_of(context.run_config, context.run_id), client_of(context.node_config))
    except HalfpassError as error:
        reply = refusal(data, f"node {context.node_id}", error)
    else:
        reply = client.answer(data)
    return Message(as_record(reply), reply_to=message)


def _client(config: Config, index: int) -> RoundClient:
    global _newest
    if _newest is None or _newest[0] != config or _newest[1].index != index:
        logs.begin(config.log)
        _newest = config, RoundClient(config, index)
    return _newest[1]
