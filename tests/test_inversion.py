"""benchmarks/inversion.py: pictures are rebuilt where the client half is known, and not with another one."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import inversion

CHANCE = 100 / 200  # percent


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("inversion") / "inversion.json"
    assert inversion.main(["--quick", "--out", str(file)]) == 0
    content = json.loads(file.read_text())
    assert content["command"].startswith("python benchmarks/inversion.py --quick")
    assert content["environment"]["torch"]
    return {row["attacker_knows"]: row for row in content["rows"]}


def test_who_knows_the_client_half_rebuilds_and_identifies_pictures(rows):
    known, nothing = rows["the client half"], rows["no activations"]
    assert known["ssim"] > nothing["ssim"] + 0.3
    assert known["identified_%"] > 95
    assert known["identified_by_activations_%"] == 100


def test_who_has_a_half_of_another_seed_only_guesses(rows):
    guess, nothing = rows["the settings but the seed"], rows["no activations"]
    assert guess["ssim"] < nothing["ssim"]
    assert guess["identified_%"] <= 4 * CHANCE
    assert guess["identified_by_activations_%"] <= 4 * CHANCE


def test_of_other_pictures_activations_nothing_is_found(rows, monkeypatch):
    """The control of the measure itself: what comes in are the activations of pictures in another order."""
    real = inversion.received
    asked = []

    def shuffled(client, data, pictures, codec):
        asked.append(len(pictures))
        found = real(client, data, pictures, codec)
        return found.roll(1, 0) if len(asked) == 3 else found  # after one for its shape, and the attacker's own

    monkeypatch.setattr(inversion, "received", shuffled)
    first = next(inversion.rows(inversion.digits()))
    assert asked == [1, 700, 200, 200]
    assert first["identified_%"] <= 4 * CHANCE
    assert first["identified_by_activations_%"] <= 4 * CHANCE


@pytest.mark.parametrize("flip", [False, True])
def test_a_moved_picture_is_found_in_its_position(flip):
    pictures = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = inversion.moved(pictures, 2, -1, flip) / 255
    numbers = torch.arange(20)
    assert inversion.percent_found(inversion.distances_in_any_position(found, pictures, 2, 255), numbers) == 100
    assert inversion.percent_found(inversion.distances_in_any_position(found, pictures.flip(2), 2, 255), numbers) < 50


def test_data_is_asked_for(capsys):
    with pytest.raises(SystemExit, match="2"):
        inversion.main([])
    assert "expected --data DIR or --quick" in capsys.readouterr().err
