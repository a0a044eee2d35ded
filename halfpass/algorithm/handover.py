"""What clients hand to each other between epochs: weights, buffers and, in a relay, the optimizer's memory."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from halfpass.algorithm.client import Client

_OPTIMIZER = "optimizer."


def client_weights(client: Client) -> dict[str, Tensor]:
    """All parameters and buffers of client half (`half.…`) and auxiliary head (`head.…`), on the CPU, copied."""
    state = {f"half.{name}": value for name, value in client.half.state_dict().items()}
    if client.head is not None:
        state |= {f"head.{name}": value for name, value in client.head.state_dict().items()}
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def load_client_weights(client: Client, state: Mapping[str, Tensor]) -> None:
    """The inverse of `client_weights`; names must agree exactly."""
    client.half.load_state_dict(_part(state, "half."))
    if client.head is not None:
        client.head.load_state_dict(_part(state, "head."))


def relay_state(client: Client) -> dict[str, Tensor]:
    """Weights and the optimizer's state, so that the next client goes on as if it had been one client throughout."""
    memory = client.optimizer.state_dict()["state"]
    return client_weights(client) | {
        f"{_OPTIMIZER}{index}.{key}": value.detach().to("cpu", copy=True)
        for index, entries in memory.items()
        for key, value in entries.items()
        if isinstance(value, Tensor)
    }


def relay_memory(client: Client) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of whatever the optimizer may remember, by its name in `relay_state`."""
    parameters = [p for group in client.optimizer.param_groups for p in group["params"]]
    kinds: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    kinds |= {f"{_OPTIMIZER}{i}.step": ((), torch.float32) for i in range(len(parameters))}
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
        kinds |= {f"{_OPTIMIZER}{i}.{key}": (tuple(p.shape), p.dtype) for i, p in enumerate(parameters)}
    return kinds


def load_relay_state(client: Client, state: Mapping[str, Tensor]) -> None:
    """The inverse of `relay_state`."""
    load_client_weights(client, {name: value for name, value in state.items() if not name.startswith(_OPTIMIZER)})
    memory: dict[int, dict[str, Tensor]] = {}
    for name, value in _part(state, _OPTIMIZER).items():
        index, key = name.split(".", 1)
        memory.setdefault(int(index), {})[key] = value
    groups = client.optimizer.state_dict()["param_groups"]
    client.optimizer.load_state_dict({"state": memory, "param_groups": groups})


def average_weights(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of the clients' weights and buffers, every client alike.

    A client with more samples has made as many more steps since the last average, and so has its part in it. To weight
    it by its samples, too, as FedAvg does (McMahan et al. 2017), would count those twice (Wang et al. 2020, FedNova).
    BatchNorm's statistics are averaged with the rest; whole-number buffers, such as its batch counter, are rounded.
    """
    mean = {}
    for name, first in states[0].items():
        value = sum(state[name].double() for state in states) / len(states)
        assert isinstance(value, Tensor)
        mean[name] = (value if first.is_floating_point() else torch.round(value)).to(first.dtype)
    return mean


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
