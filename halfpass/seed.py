"""Seeds: every random stream has a name, so that it does not depend on which process draws first."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits for the stream that `parts` name, e.g. `derive_seed(seed, "augment", client, epoch)`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
