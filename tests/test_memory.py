"""The peak of this process's own memory, against an allocation of known size."""

import sys

import pytest
import torch

from halfpass.run.memory import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is of all time")
def test_a_known_allocation_shows_also_after_it_is_freed_and_after_an_earlier_larger_one():
    earlier = torch.ones(100 * 2**20, dtype=torch.uint8)
    del earlier
    memory = PeakMemory(torch.device("cpu"))
    assert memory.peak_bytes() < 8 * 2**20
    now = torch.ones(50 * 2**20, dtype=torch.uint8)
    del now
    assert 48 * 2**20 <= memory.peak_bytes() < 60 * 2**20  # the kernel counts resident pages in batches
