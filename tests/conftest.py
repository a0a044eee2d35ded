"""Shape annotations of what computes are checked while the tests run; one thread, so that sums repeat exactly.

Not those of networks, which torch.fx calls with stand-ins for tensors.
"""

import gc
import multiprocessing
import random
from pathlib import Path
from unittest import mock

from jaxtyping import install_import_hook

gc.disable()  # until everything is imported

# beartype draws the item that it looks at; from numbers of its own, for those of a network or a data set are compared.
with mock.patch("random.getrandbits", random.Random(0).getrandbits):
    import beartype

    @beartype.beartype
    def _looked_at(items: list[int]) -> None: ...


_before = random.getstate()
_looked_at([1, 2])
assert random.getstate() == _before

PACKAGE = Path(__file__).parent.parent / "halfpass"
# Networks are called with stand-ins for tensors.
UNCHECKED = ("models", "resnet", "unet", "transformer", "trace", "split", "observe", "planning", "replay", "checking", "__init__")
CHECKED = [
    f"halfpass.{room}.{file.stem}"
    for room in ("algorithm", "arithmetic", "data", "networks")
    for file in sorted((PACKAGE / room).glob("*.py"))
    if file.stem not in UNCHECKED
]
hook = install_import_hook(CHECKED, "beartype.beartype")

import pytest  # noqa: E402
import torch  # noqa: E402

import halfpass.tasks.metrics  # noqa: E402, F401  # which most tests import sooner or later
from halfpass.data.datasets import Dataset, Samples  # noqa: E402


def pytest_collection_finish():
    """Runs collect garbage before they measure memory: half a second, if what is imported were looked through too."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    multiprocessing.set_start_method(None, force=True)  # `halfpass join` in this process has chosen another


@pytest.fixture
def data():
    """96 noisy pictures of 10 classes with a shifted mean, so that BatchNorm and biases have work to do."""
    draws = torch.Generator().manual_seed(7)
    labels = torch.randint(0, 10, (96,), generator=draws)
    pictures = torch.randn(96, 1, 8, 8, generator=draws) + 3 + labels[:, None, None, None] / 4
    train, test = Samples(pictures[:64], labels[:64]), Samples(pictures[64:], labels[64:])
    return Dataset("noise", train, test, 10, (), ())
