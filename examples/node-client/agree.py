"""What a client says at joining and cannot know without halfpass, as JSON: python agree.py > join.json

Run where halfpass is installed; anew where run.yaml or network.py has changed. What crosses, and how many classes there
are, is the client's to say: the two lines below the imports. tests/test_node_client.py compares join.json with it.
"""

import json
from pathlib import Path

import yaml

from halfpass.config import from_dict
from halfpass.run.network import build_network, written_spec
from halfpass.run.setup import agreed_settings

INPUTS = {"": ("float32", (8, 4, 4))}  # dtype and shape per sample, by name
CLASSES = 4

config = from_dict(yaml.safe_load(Path("run.yaml").read_text()))
network = build_network(config, INPUTS, CLASSES)
client, server = network.halves.client.state_dict(), network.halves.server.state_dict()
state = {f"client {name}": value for name, value in client.items()}
state |= {f"server {name}": value for name, value in server.items()}
said = {
    "settings": {name: value for name, value in agreed_settings(config).items() if value is not None},
    "inputs": written_spec(INPUTS),
    "outputs": CLASSES,
    "parameters": network.parameters,
    "crossing": [list(shape) for shape in network.cut_shapes],  # per sample
    "state": [(name, list(value.shape)) for name, value in state.items()],  # for the fingerprint
}
lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in said.items())
print("{\n" + ",\n".join(lines) + "\n}")
