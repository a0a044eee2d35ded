"""What Flower starts on each node: `clientapp = "halfpass.flower.client_app:app"`."""

from functools import partial

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from halfpass.config import Config
from halfpass.errors import HalfpassError
from halfpass.flower.exchange import as_record, of_record
from halfpass.flower.settings import STREAM, client_of, config_of
from halfpass.flower.stream import PLACE, answer
from halfpass.run import logs
from halfpass.run.round_client import RoundClient, refusal

app = ClientApp()
_newest: tuple[Config, RoundClient] | None = None  # a simulation's processes serve several clients, one after the other


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round of the client whose number this node has."""
    data = of_record(message.content, PLACE)
    try:
        client = _client(config_of(context.run_config, context.run_id), client_of(context.node_config))
    except HalfpassError as error:
        reply = refusal(data, f"node {context.node_id}", error)
    else:
        reply = client.answer(data)
    return Message(as_record(reply), reply_to=message)


@app.train(STREAM)
def stream(message: Message, context: Context) -> Message:
    """The whole run of that client, by a stream of halfpass's own to the server."""

    def config() -> Config:
        settings = config_of(context.run_config, context.run_id)
        logs.begin(settings.log)
        return settings

    data = of_record(message.content, PLACE)
    reply = answer(data, config, partial(client_of, context.node_config), context.node_id)
    return Message(as_record(reply), reply_to=message)


def _client(config: Config, index: int) -> RoundClient:
    global _newest
    if _newest is None or _newest[0] != config or _newest[1].index != index:
        logs.begin(config.log)
        _newest = config, RoundClient(config, index)
    return _newest[1]
