"""Valid bytes, changed, into every decoder of bytes from outside: each gives a value, or refuses in its own words.

The decoders and their valid inputs: benchmarks/decoders.py. Longer, and guided: benchmarks/fuzz.py.
"""

import json
import random
import sys
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import fuzz
from decoders import DECODERS

from halfpass.errors import InputError
from halfpass.run.saved import read_weights

FEW = settings(
    max_examples=100, derandomize=True, database=None, deadline=timedelta(seconds=5),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
numbers = st.integers(0, 2**20 - 1)
changes = st.lists(st.tuples(st.integers(0, len(fuzz.CHANGES) - 1), numbers, numbers, numbers), min_size=1, max_size=3)


@pytest.mark.filterwarnings("ignore")  # Pillow's and PyTorch's, of what is wrong with an input
@pytest.mark.parametrize("name", DECODERS)
def test_valid_inputs_decode_and_changed_ones_decode_or_are_refused(name, tmp_path):
    decoder, ended = DECODERS[name](tmp_path), Counter()

    @FEW
    @given(numbers, changes)
    def any_change(which, made):
        data = decoder.seeds[which % len(decoder.seeds)]
        for kind, where, amount, other in made:
            data = fuzz.change(data, kind, where, amount, decoder.seeds[other % len(decoder.seeds)])
        try:
            decoder.decode(data)
            ended["values"] += 1
        except decoder.refusals:
            ended["refusals"] += 1

    for seed in decoder.seeds:
        assert decoder.decode(seed) is not None
    any_change()
    assert ended["refusals"] > 0
    assert ended["values"] > 0 or name in ("stores", "spools", "checkpoints")  # whose checksums see every change
    for seed in decoder.seeds:  # and no input is remembered by those that come after it
        assert decoder.decode(seed) is not None


def test_a_folder_in_place_of_weights_is_refused(tmp_path):
    file = tmp_path / "client-0.safetensors"
    file.mkdir()
    with pytest.raises(InputError, match=r"client-0.safetensors: expected a safetensors file, found OSError: .*; copy it again from its owner"):
        read_weights(file)


def test_every_kind_of_change_changes_something_and_any_numbers_will_do():
    draws = random.Random(0)
    for kind in range(len(fuzz.CHANGES)):
        results = {fuzz.change(b"\x08\x96\x01abc", kind, draws.randrange(99), draws.randrange(999), b"other") for _ in range(50)}
        assert len(results) > 4
        assert isinstance(fuzz.change(b"", kind, 7, 9, b""), bytes)


def test_another_exception_is_counted_and_its_input_kept(tmp_path, capsys):
    trial = fuzz.Trial("codec int8", 10**9, 10**9, tmp_path)

    def decode(data):
        if data == b"no":
            raise ValueError("a refusal")
        return {b"yes": 1}[data]

    trial.decoder = replace(trial.decoder, decode=decode)
    for data in (b"yes", b"no", b"other", b"more"):
        trial(data)
    assert trial.counts == {"inputs": 4, "values": 1, "refusals": 1, "other": 2}
    assert [*trial.failures.values()] == [2]
    assert (tmp_path / "failed-0").read_bytes() == b"other"
    assert "KeyError at test_fuzz.py:" in capsys.readouterr().out


def test_rows_are_kept_when_it_goes_on(tmp_path, capfd, monkeypatch):
    out = tmp_path / "fuzz.json"
    arguments = ["--inputs", "300", "--out", str(out), "--decoder"]
    assert fuzz.main([*arguments, "codec bf16"]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["decoder"], row["inputs"], row["other"], row["limit"]) == ("codec bf16", 300, 0, "300 inputs")
    assert row["values"] + row["refusals"] == 300
    assert row["values"] > 0
    del row["environment"]
    monkeypatch.setattr(fuzz, "measure", lambda name, options: {**row, "decoder": name})  # which takes seconds to start
    assert fuzz.main([*arguments, "codec bf16,codec none"]) == 0
    kept = json.loads(out.read_text())["rows"][1]
    assert (kept["decoder"], kept["seconds"]) == ("codec bf16", row["seconds"])
    assert capfd.readouterr().out.count("codec bf16") == 1
    assert fuzz.main([*arguments, "codec bf16", "--again"]) == 0
    assert [row["decoder"] for row in json.loads(out.read_text())["rows"]] == ["codec none", "codec bf16"]
    assert capfd.readouterr().out.count("codec bf16") == 1
    assert fuzz.main(["--decoder", "nothing"]) == 2
