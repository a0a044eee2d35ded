"""Partitions: nothing lost, nothing doubled, nobody empty, and alpha does what it says."""

import math

import pytest
import torch

from halfpass.data.partition import PARTITIONS, partition
from halfpass.errors import InputError

LABELS = torch.arange(1000) % 10  # ten classes, a hundred each
DEALT = sorted(PARTITIONS.keys() - {"own"})


def shares(shards: list[torch.Tensor]) -> torch.Tensor:
    """(clients, classes): which part of each class a client holds."""
    counts = torch.stack([LABELS[shard].bincount(minlength=10) for shard in shards]).double()
    return counts / counts.sum(0)


@pytest.mark.parametrize("kind", DEALT)
@pytest.mark.parametrize("clients", [1, 3, 10, 999, 1000])
@pytest.mark.parametrize("alpha", [1e-3, 0.5, 100.0])
def test_every_sample_has_one_client_and_every_client_a_sample(kind: str, clients: int, alpha: float) -> None:
    shards = partition(kind, LABELS, clients, alpha=alpha, seed=0)
    assert len(shards) == clients
    assert all(len(shard) > 0 and shard.dtype == torch.int64 for shard in shards)
    assert torch.equal(torch.cat(shards).sort().values, torch.arange(1000))


@pytest.mark.parametrize("kind", DEALT)
def test_the_seed_decides(kind: str) -> None:
    first, again, other = (partition(kind, LABELS, 4, alpha=0.5, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_iid_cuts_evenly_and_mixes_classes() -> None:
    shards = partition("iid", LABELS, 3, alpha=1.0, seed=0)
    assert sorted(len(shard) for shard in shards) == [333, 333, 334]
    assert ((shares(shards) - 1 / 3).abs() < 0.2).all()
    assert not torch.equal(shards[0], torch.arange(334))  # shuffled first, not cut from the front


def test_small_alpha_gives_a_class_to_one_client_and_large_alpha_to_all() -> None:
    skewed, mixed = (shares(partition("dirichlet", LABELS, 5, alpha=alpha, seed=0)) for alpha in (0.01, 10_000.0))
    assert (skewed.max(0).values > 0.9).float().mean() >= 0.8  # most classes lie almost wholly with one client
    assert skewed.max(0).indices.unique().numel() > 1  # and not with the same one
    assert ((mixed - 0.2).abs() < 0.03).all()


def test_dirichlet_shares_have_the_moments_of_the_distribution() -> None:
    # Of one share of Dirichlet(alpha) over K clients: mean 1/K, variance (1/K)(1 - 1/K) / (K alpha + 1).
    drawn = torch.cat([shares(partition("dirichlet", LABELS, 4, alpha=1.0, seed=seed)) for seed in range(40)])
    assert math.isclose(drawn.mean(), 1 / 4, rel_tol=1e-6)
    assert math.isclose(drawn.var(), (1 / 4) * (3 / 4) / 5, rel_tol=0.15)


def test_empty_clients_are_filled_from_the_largest() -> None:
    labels = torch.zeros(50, dtype=torch.int64)  # one class and a tiny alpha: one client draws everything
    sizes = sorted(len(shard) for shard in partition("dirichlet", labels, 10, alpha=1e-6, seed=3))
    assert sizes == [1] * 9 + [41]


def test_own_gives_everything_to_everyone() -> None:
    shards = partition("own", LABELS, 3, alpha=1.0, seed=0)
    assert len(shards) == 3
    assert all(torch.equal(shard, torch.arange(1000)) for shard in shards)


def test_a_wrong_kind_names_the_near_one_and_all_there_are() -> None:
    with pytest.raises(InputError) as caught:
        partition("dirichlt", LABELS, 2, alpha=1.0, seed=0)
    expected = f"one of {', '.join(PARTITIONS)}"
    assert str(caught.value) == f"clients.partition: expected {expected}, found 'dirichlt'; did you mean 'dirichlet'?"


@pytest.mark.parametrize("clients", [0, 1001])
@pytest.mark.parametrize("kind", PARTITIONS)
def test_clients_without_samples_are_refused(kind: str, clients: int) -> None:
    with pytest.raises(InputError) as caught:
        partition(kind, LABELS, clients, alpha=1.0, seed=0)
    assert str(caught.value) == (
        f"clients.count: expected 1 to 1000, because there are 1000 samples, found {clients}; "
        "ask for fewer clients or give more samples"
    )
    assert len(partition(kind, LABELS, 1000, alpha=1.0, seed=0)) == 1000


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_alpha_that_is_no_positive_number_is_refused(alpha: float) -> None:
    with pytest.raises(InputError) as caught:
        partition("dirichlet", LABELS, 2, alpha=alpha, seed=0)
    assert str(caught.value) == (
        f"clients.alpha: expected a finite number above 0, found {alpha}; 0.1 is skewed, 100 is near uniform"
    )
    assert len(partition("dirichlet", LABELS, 2, alpha=0.1, seed=0)) == 2
