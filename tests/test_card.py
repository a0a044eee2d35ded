"""The model card says what the run's files say, and marks the rest for its author."""

import json

import pytest
import yaml
from test_predict import trained

from halfpass.commands.card import write_card
from halfpass.commands.cli import main
from halfpass.config import ClientsConfig
from halfpass.errors import InputError


@pytest.mark.parametrize("method", ["decoupled", "centralized"])
def test_a_card_is_written_from_the_run(tmp_path, capsys, method):
    run = tmp_path / "run"
    clients = ClientsConfig(2, partition="own") if method == "decoupled" else ClientsConfig()
    result = trained(run, method=method, clients=clients)
    assert main(["card", str(run)]) == 0
    assert capsys.readouterr().out == f"wrote {run}/README.md: look for TODO\n"
    text = (run / "README.md").read_text()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["pipeline_tag"] == "image-classification"
    (found,) = header["model-index"][0]["results"]
    assert found["dataset"]["name"] == "digits"
    assert {m["type"]: m["value"] for m in found["metrics"]}["accuracy"] == round(result["test_accuracy"], 6)
    assert f"| accuracy | {result['test_accuracy']:.4g} |" in text
    assert result["environment"]["hardware"] in text
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained_on = sum(row["samples"] for row in rows if row["process"] != "server")
    assert f"Training samples in an epoch: {trained_on:,}." in text
    assert "license: TODO" in text
    assert ("docs/concepts/threat-model.md" in text) == (method == "decoupled")
    assert ("| cut behind | block_2 |" in text) == (method == "decoupled")
    assert ("## Score of each site" in text) == (method == "decoupled")
    (run / "metrics.jsonl").unlink()
    write_card([run], tmp_path / "card.md")
    assert "Numbers of samples: TODO" in (tmp_path / "card.md").read_text()
    (run / "result.json").unlink()
    with pytest.raises(InputError, match=r"expected a finished run's folder, found no result.json"):
        write_card([run], tmp_path / "card.md")
