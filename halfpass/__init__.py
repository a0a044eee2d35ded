"""halfpass: split learning in which only the forward pass crosses the wire.

This is the contents page of public names. A run from settings to result files: `train(Config(...))`. The algorithm by
itself, on your own modules and loops: `split`, `build_head`, `Client`, `Server` and the step functions.
"""

from halfpass.algorithm import client as client_steps
from halfpass.algorithm import server as server_steps
from halfpass.algorithm.client import Client
from halfpass.algorithm.server import Server
from halfpass.arithmetic.precision import Arithmetic
from halfpass.commands.export import export
from halfpass.config import (
    ClientsConfig,
    Config,
    DataConfig,
    ModelConfig,
    ServerConfig,
    TaskConfig,
    TrainConfig,
    WireConfig,
)
from halfpass.cut import CutBatch
from halfpass.errors import HalfpassError, InputError, RunError
from halfpass.networks.cut_table import cut_table
from halfpass.networks.heads import build_head
from halfpass.networks.models import build_model
from halfpass.networks.split import Halves, cut_shapes, join_state, joint, split
from halfpass.run.predictor import Predictor, load
from halfpass.run.train import compare, train
from halfpass.tasks.task import Task
from halfpass.wire.loopback import Loopback

__all__ = [
    "Arithmetic",
    "Client",
    "ClientsConfig",
    "Config",
    "CutBatch",
    "DataConfig",
    "HalfpassError",
    "Halves",
    "InputError",
    "Loopback",
    "ModelConfig",
    "Predictor",
    "RunError",
    "Server",
    "ServerConfig",
    "Task",
    "TaskConfig",
    "TrainConfig",
    "WireConfig",
    "build_head",
    "build_model",
    "client_steps",
    "compare",
    "cut_shapes",
    "cut_table",
    "export",
    "join_state",
    "joint",
    "load",
    "server_steps",
    "split",
    "train",
]
