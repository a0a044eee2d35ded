"""Seeds: every random stream has a name, so that it does not depend on which process draws first."""

import hashlib
import random

import numpy as np


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits for the stream that `parts` name, e.g. `derive_seed(seed, "augment", client, epoch)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_python(seed: int, client: int, epoch: int, step: int, before: int) -> None:
    """Python's and NumPy's random numbers for a step, the same at either half: both may go through the same Python of a
    network, and must decide alike."""
    value = derive_seed(seed, "python", client, epoch, step, before)
    random.seed(value)
    np.random.seed(value % 2**32)
