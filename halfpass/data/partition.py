"""Partitions: which samples each client trains on.

`iid` and `dirichlet` deal every sample to exactly one client, and every client gets at least one; the same seed deals
the same way. Check: `pytest tests/test_partition.py`.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from halfpass.errors import InputError, choice_error
from halfpass.seed import derive_seed

Shards = list[Int64[Tensor, " _"]]


def partition(kind: str, labels: Int64[Tensor, " N"], clients: int, *, alpha: float, seed: int) -> Shards:
    """The sample numbers of each client: `clients` tensors of int64, each ascending and not empty.

    `kind` is a name of `PARTITIONS`. `alpha` is Dirichlet's concentration: small gives clients of few classes each,
    large the same mixture to all; the other kinds take no notice of it. Raises InputError for an unknown kind, for
    `alpha` that is not a positive number, and for more clients than samples.
    """
    if kind not in PARTITIONS:
        raise choice_error("clients.partition", PARTITIONS, kind)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise InputError("clients.alpha", "a finite number above 0", f"{alpha}", "0.1 is skewed, 100 is near uniform")
    if not 1 <= clients <= len(labels):
        raise InputError(
            "clients.count", f"1 to {len(labels)}, because there are {len(labels)} samples", f"{clients}",
            "ask for fewer clients or give more samples",
        )
    shards = PARTITIONS[kind](labels, clients, alpha, derive_seed(seed, "partition", kind))
    return [shard.sort().values for shard in shards]


def iid(labels: Tensor, clients: int, alpha: float, seed: int) -> Shards:
    """Shuffled and cut into pieces whose sizes differ by at most one."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(clients))


def dirichlet(labels: Tensor, clients: int, alpha: float, seed: int) -> Shards:
    """Each class is dealt in proportions drawn from Dirichlet(alpha) over the clients (Yurochkin et al. 2019,
    arXiv 1905.12022, section 4; Hsu et al. 2019, arXiv 1909.06335, draw per client instead)."""
    draws = np.random.default_rng(seed)
    shards: list[list[int]] = [[] for _ in range(clients)]
    for label in labels.unique().tolist():
        indices = draws.permutation((labels == label).nonzero().flatten().numpy())
        shares = draws.dirichlet(np.full(clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
        for shard, piece in zip(shards, np.split(indices, cuts), strict=True):
            shard.extend(piece.tolist())
    _fill_empty(shards)
    return [torch.tensor(shard, dtype=torch.int64) for shard in shards]


def own(labels: Tensor, clients: int, alpha: float, seed: int) -> Shards:
    """Everything to everyone: each client stands at its own site and was given that site's data only."""
    return [torch.arange(len(labels)) for _ in range(clients)]


def _fill_empty(shards: list[list[int]]) -> None:
    # Moving one sample always comes to an end; drawing again may not, with a small alpha and many clients.
    for shard in shards:
        if not shard:
            shard.append(max(shards, key=len).pop())


PARTITIONS: dict[str, Callable[[Tensor, int, float, int], Shards]] = {"iid": iid, "dirichlet": dirichlet, "own": own}
