"""The command line: every kind of bad input gets one line, its exit status, and leaves nothing behind."""

import copy
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from plain import equal
from safetensors.torch import load_file

from halfpass.commands.cli import main
from halfpass.commands.streams import Lasting
from halfpass.config import Config, ModelConfig, as_dict, flatten, from_dict, nested
from halfpass.errors import InputError, PassedOnError
from halfpass.run import setup
from halfpass.run.children import leave_when_told
from halfpass.wire import connection

QUICK = ["--train.epochs", "1", "--train.batch_size", "64", "--data.limit", "128", "--train.threads", "1"]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def fails(capsys, words, status, pattern):
    assert main(words) == status
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"halfpass: {pattern}\n", said.err), said.err


CHOICES = "decoupled, conventional, centralized"
TWO = [*QUICK, "--clients.count", "2", "--train.batch_size", "4"]


@pytest.mark.parametrize(("words", "pattern"), [
    (["tran"], r"command: expected one of new, .*, found 'tran'; did you mean 'train'\?"),
    ([], "command: expected one of new, .*, found none; see halfpass --help"),
    (["--train.lr=0.1", "train"], "command: expected the command before its options, found --train.lr=0.1; write the command first"),
    (["train", "--train.epoch", "3"], r"arguments: .* found --train.epoch; did you mean '--train.epochs'\?"),
    (["train", "--method", "decopled"], rf"method: expected one of {CHOICES}, found 'decopled'; did you mean 'decoupled'\?"),
    (["train", "--lr", "1"], r"arguments: expected a known option, found --lr; did you mean '--train.lr'\?"),
    (["train", "--seed", "1"], r"arguments: expected a known option, found --seed; did you mean '--train.seed'\?"),
    (["train", "--task", "regression"], r"data digits, targets for task regression: expected floating point \(N,\) or \(N, columns\), found torch.int64 \(1437,\); .*"),
    (["train", "--task=regresion"], "task.name: expected one of classification, .*, found 'regresion'; did you mean 'regression'\\?"),
    (["train", "--name", "x"], r"arguments: expected a known option, found --name; did you mean '--data.name' or '--task.name' or '--model.name'\?"),
    (["train", "--model", "resnet20"], "--model: expected one of its settings by name, such as --model.name, found 'resnet20'; name it"),
    (["train", "--wire.budget", "10MB"], "wire.budget: expected a whole number, found '10MB'; write 10000000"),
    (["train", "--wire.window", "32MB"], "wire.window: expected a whole number, found '32MB'; write 32000000"),
    (["train", "--server.store_limit", "1.5GiB"], "server.store_limit: expected a whole number, found '1.5GiB'; write 1610612736"),
    (["train", "--train.momentum", "0.5", "--train.optimizer", "adamw"], "train.momentum: expected its default with train.optimizer adamw, found 0.5; leave it out, or set train.optimizer to sgd"),
    (["train", "--wire.budget", "1 KiB"], "wire.budget: expected a whole number, found '1 KiB'; write 1024"),
    (["train", "--data.limit", "1e3"], "data.limit: expected a whole number, found '1e3'; change it"),
    (["train", "--wire.window", "3000000000"], "wire.window: expected a number of at most 2146435071, found 3000000000; change it"),
    (["train", "--train.seed", "9" * 20], f"train.seed: expected a whole number of 64 bits, found {'9' * 20}; correct it"),
    (["train", "--train.epochs", "010"], "train.epochs: expected a number in the usual way, found 010, which YAML takes for 8: write 8, or quote a text; correct it"),
    (["train", "--train.lr=1:30"], "train.lr: expected a number in the usual way, found 1:30, which YAML takes for 90: write 90, or quote a text; correct it"),
    (["train", "--config", "octal.yaml"], "config: expected valid YAML in octal.yaml, found 010 in line 1, which YAML takes for 8: write 8, or quote a text; correct the file"),
    (["train", "--config=~nobody-of-that-name/a"], "config: expected a path, or the home folder of a user, found '~nobody-of-that-name/a'; correct it, or write ./~"),
    (["serve", "--bind", "127.0.0.1:²"], "server address: expected HOST:PORT, found '127.0.0.1:²'; for example 127.0.0.1:7465"),
    (["compare", "--seeds", "²"], "seeds: expected numbers separated by commas, found '²'; for example 0,1,2"),
    (["train", "--train.epochs", "many"], "train.epochs: expected a whole number, found 'many'; change it"),
    (["train", "--train.epochs", "0"], "train.epochs: expected a number of at least 1, found 0; change it"),
    (["train", "--train.lr", "nan"], "train.lr: expected a number, found 'nan'; change it"),
    (["train", "--train.lr"], "--train.lr: expected a value, found none; write it behind the option"),
    (["train", "--config", "none.yaml"], "config: expected a YAML file, found none at .*none.yaml; check the path"),
    (["train", "--config", "bad.yaml"], "config: expected valid YAML in bad.yaml, found .*; correct the file"),
    (["train", "--config=."], r"config: expected a YAML file, found a folder at \.; check the path"),
    (["train", "--config", "bytes.yaml"], "config: expected valid YAML in bytes.yaml, found 'utf-8' codec can't decode .*; correct the file"),
    (["train", "--config", "text.yaml"], "config: expected keys and values in text.yaml, found a str; .*"),
    (["train", "--config", "group.yaml"], "config group.yaml, train: expected settings of that group below it, found 5; correct the file"),
    (["train", "--config", "number.yaml"], "configuration: expected a known key, found '1'; .*"),
    (["train", "--config"], "--config: expected a value, found none; .*"),
    (["train", "--config", "inner.yaml"], r"configuration: expected a known key, found 'clients.cuont'; did you mean 'clients.count'\?"),
    (["train", "--train.threads", "100000"], "train.threads: expected at most 1024, found 100000; one per core is usual"),
    (["train", "--method", "centralized", "--wire.codec", "gzip"], "wire.codec: expected one of .*"),
    (["train", "--config", "unknown.yaml"], r"configuration: .* found 'train.epoch'; did you mean 'train.epochs'\?"),
    (["train", "more"], "arguments: expected options only, found 'more'; see --help"),
    (["compare", "--methods", "decoupled,centralised"], rf"methods: expected one of {CHOICES}, .* 'centralized'\?"),
    (["compare", "--seeds", "0,a"], "seeds: expected numbers separated by commas, found '0,a'; for example 0,1,2"),
    (["train", "--data.name", "cifr10"], r"data.name: expected .*, found 'cifr10'; did you mean 'cifar10'\?"),
    (["train", "--data.name", "cifar10"], "data.path: expected the place of cifar-10-batches-py or .*, found none; give the folder that holds it"),
    (["train", "--data.name", "cifar10", "--data.path", "nowhere"], "nowhere: expected cifar-10-batches-py or .*, found no such file or folder; .*"),
    (["train", "--model.name", "resnet21"], r"model.name: expected one of resnet20, .*, found 'resnet21'; did you mean 'resnet32'\?"),
    (["train", "--model.cut", "blok_2"], r"model.cut 'blok_2': expected the name of a layer, found no such layer; did you mean 'block_2'\?"),
    (["train", "--model.head", "linaer"], r"model.head: expected .* did you mean 'linear'\?"),
    (["train", "--model.head", "conv", "--model.cut", "pool"], r"model.head 'conv': expected a cut of shape .*, found .*"),
    (["train", "--wire.codec", "gzip"], "wire.codec: expected one of none, fp16, bf16, int8, .*, found 'gzip'; use one of those"),
    (["train", "--wire.window", "1000"], "wire.window: expected at least .* bytes, one batch at this cut, found 1000; .*"),
    (["train", *TWO, "--wire.window", "121015"], "wire.window: expected at least 121016 bytes, the client half that is handed over, found 121015; .*"),
    (["train", *TWO, "--clients.topology", "relay", "--wire.window", "121016"], "wire.window: expected at least 242032 bytes, the client half .*"),
    (["train", *TWO, "--clients.topology", "relay", "--train.optimizer", "adamw", "--wire.window", "242032"], "wire.window: expected at least 363048 bytes, .*"),
    (["train", "--clients.count", "5000"], "clients.count: expected 1 to 1437, because there are 1437 samples, found 5000; ask for fewer .*"),
    (["train", "--train.batch_size", "2000"], "train.batch_size: expected at most .*, the samples of client 0, found 2000; .*"),
    (["train", "--clients.rounds", "2", "--clients.topology", "relay"], "clients.rounds: expected 1 in topology relay, found 2; leave it out"),
    (["train", "--clients.count", "2", "--clients.rounds", "7"], "clients.rounds: expected at most 6, the batches of the largest client in an epoch, found 7; choose fewer"),
    (["train", "--train.device", "tpu"], "train.device: expected a device of this machine, found 'tpu' .*; use cpu"),
    (["train", "--train.label_smoothing", "1"], "train.label_smoothing: expected at least 0 and less than 1, found 1.0; .*"),
    (["train", "--method", "centralized", "--server.replay", "3"], "server.replay: expected its default with method centralized, which has one part, found 3; .*"),
    (["train", "--train.momentum", "0"], "train.nesterov: expected a momentum above 0, .*"),
    (["serve", "--bind", "0.0.0.0:1"], "server address: expected a loopback host .*, found '0.0.0.0'; make certificates with halfpass certs and give --tls.folder, or say --insecure"),
    (["serve", "--method", "centralized"], "method: expected decoupled or conventional between processes, found 'centralized'; use halfpass train"),
    (["join", "127.0.0.1:1", "--method", "centralized"], "method: expected decoupled or conventional between processes, found 'centralized'; .*"),
    (["join", "example.org:1"], "server address: expected a loopback host .*"),
    (["join"], "arguments: expected join.address, found none; see --help"),
    (["join", "127.0.0.1:1", "--client", "1"], "client: expected a number from 0 to 0, found 1; .*"),
    (["retrain", "--train.lr", "0.1", "run"], "retrain: expected the folder of a run first, then the options, found --train.lr; write it first"),
    (["train", "--method", "centralized", "--train.batch_size", "2000"], "train.batch_size: expected 1 to 1437, .*, found 2000; .*"),
    (["report", "nothing"], "nothing: expected .*"),
    (["cuts", "--model.name", "resnet21"], "model.name: expected one of .*"),
    (["cuts", "--model.head", "nosuch"], "model.head: expected one of .*, found 'nosuch'; .*"),
    (["train", *QUICK, "--out", "bad.yaml/x"], "out: expected a folder, found a file at .*bad.yaml; choose another name"),
    (["train", *QUICK, "--train.device", "meta"], "train.device: expected .*, found 'meta'.*"),
])  # fmt: skip
def test_wrong_arguments_get_one_line_and_exit_2(capsys, tmp_path, words, pattern):
    (tmp_path / "bad.yaml").write_text("train: [")
    (tmp_path / "octal.yaml").write_text("train: {epochs: 010}")
    (tmp_path / "unknown.yaml").write_text("train: {epoch: 3}")
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(128, 256)))
    (tmp_path / "text.yaml").write_text("a secret")
    (tmp_path / "group.yaml").write_text("train: 5")
    (tmp_path / "number.yaml").write_text("1: 2")
    (tmp_path / "inner.yaml").write_text("clients: {cuont: 3}")
    before = sorted(tmp_path.iterdir())
    fails(capsys, words, 2, pattern)
    assert sorted(tmp_path.iterdir()) == before


def test_a_good_run_after_all_that(capsys, tmp_path):
    assert main(["train", *QUICK, "--out", "run"]) == 0
    said = capsys.readouterr()
    assert "report: run/report.html" in said.out
    assert "epoch 1/1" in said.err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "client-0.safetensors", "config.yaml", "data.json", "metrics.jsonl", "report.html", "result.json", "server.safetensors",
    ]  # fmt: skip
    fails(capsys, ["train", *QUICK, "--out", "run"], 2, "out: expected a folder without a run, found metrics.jsonl in run; .*")
    assert main(["export", "run"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert main(["report", "run", "--out", "again.html"]) == 0
    assert (tmp_path / "again.html").stat().st_size > 10_000
    capsys.readouterr()
    fails(capsys, ["report", "run", "--out", "again.html/x.html"], 2, "--out: expected a folder, found a file at again.html; .*")
    for out in ("again.html/x", "run"):
        fails(capsys, ["export", "run", "--out", out], 2, "out: expected a .*, found a .*")
    (tmp_path / "run" / "config.yaml").write_text("train: [")
    fails(capsys, ["export", "run"], 2, "run/config.yaml: expected the settings of a run, found while parsing .*")


def test_nan_names_side_epoch_and_step_and_exits_with_1(capsys, tmp_path):
    words = ["train", *QUICK, "--train.lr", "1e30", "--train.schedule", "constant", "--out", "run"]
    fails(capsys, words, 1, r"(client 0, auxiliary loss|server, batch of client 0), epoch 1, step 2: "
                            r"expected a finite loss, found (nan|inf); lower train.lr")  # fmt: skip
    assert not (tmp_path / "run" / "result.json").exists()


def test_port_in_use_and_no_server(capsys, monkeypatch):
    monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        fails(capsys, ["serve", "--bind", address], 2, f"server address: expected a free port, found {address}, which .*")
    fails(capsys, ["join", address], 2, f"server address: expected a halfpass server within .*, found none at {address}; .*")


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"halfpass {metadata.version('halfpass')}\n")


def test_every_path_may_begin_at_home(capsys, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    (home / "some.yaml").write_text("train: {epochs: 1}")
    (home / "grid.yaml").write_text("{settings: {data.limit: 128, train.threads: 1, train.epochs: 1, train.batch_size: 64}, seeds: [0], axes: {m: {a: {}}}}")
    assert main(["train", *QUICK, "--config=~/some.yaml", "--out", "~/run", "--server.store=~/kept"]) == 0
    assert main(["export", "~/run", "--out=~/whole.safetensors", "--data.path", "~/nothing"]) == 0
    assert main(["report", "~/run", "--out=~/r/page.html"]) == 0
    assert main(["retrain", "~/run", "--out=~/again"]) == 0
    assert main(["paper", "~/grid.yaml", "--out=~/paper", "--results=~/rows.json"]) == 0
    capsys.readouterr()
    fails(capsys, ["resume", "~/run"], 2, f"resume: expected a training that was broken off, found {home}/run, which is finished; read its report")
    fails(capsys, ["join", "127.0.0.1:1", "--client=1", "--out=~/run"], 2, "client: .*")
    made = {"some.yaml", "grid.yaml", "run", "kept", "whole.safetensors", "whole.json", "r", "again", "paper", "rows.json"}
    assert {file.name for file in home.iterdir() if file.name[0] != "."} == made  # libraries keep caches there
    assert [file.name for file in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(("command", "key"), [
    ("export", "data.name"), ("export", "model.name"), ("export", "model.head"), ("resume", "model.name"), ("retrain", "model.name"),
])  # fmt: skip
def test_code_that_a_run_folder_names_is_not_run_unasked(capsys, tmp_path, command, key):
    (tmp_path / "mine.py").write_text("from pathlib import Path\nPath('ran').touch()\nraise SystemError('imported')\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(nested({key: "mine.inner:data"})))
    (run / "result.json").write_text("{}")
    named = f"mine.inner:data from {tmp_path}/mine.py"
    fails(capsys, [command, "run"], 2, f"run/config.yaml, {key}: expected no code that is run unasked, found {named}; "
                                       "look at it, and add --allow_code where you trust it")  # fmt: skip
    assert not (tmp_path / "ran").exists()
    main([command, "run", "--allow_code"])
    assert capsys.readouterr().err.startswith(f"halfpass: importing {named}, which run/config.yaml names as {key}\n")


def test_own_code_from_training_to_export(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "own_net.py").write_text("from halfpass import build_model\ndef net(shape, classes):\n    return build_model('digits-cnn', shape, classes, 0)\n")
    own = ["--model.name", "own_net:net", "--model.cut", "block_2"]
    assert main(["train", *QUICK, *own, "--out", "run", "--server.store", "kept"]) == 0
    assert main(["export", "run", "--allow_code"]) == 0
    assert main(["retrain", "run", "--out", "again", "--allow_code"]) == 0
    assert main(["retrain", "run", "--out", "other", "--model.name", "digits-cnn"]) == 0
    assert capsys.readouterr().err.count("importing") == 2


def test_an_output_that_is_not_utf_8_does_not_fail_a_finished_run(capfd, monkeypatch):
    """As of a process with PYTHONIOENCODING=ascii:strict."""
    out, err = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding="ascii") for number in (1, 2))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", out)
        patched.setattr(sys, "stderr", err)
        assert main(["train", *QUICK, "--out", "run"]) == 0
        assert isinstance(sys.stdout.buffer.raw, Lasting)
        sys.stderr.flush()
    assert Path("run", "report.html").is_file()
    out, err = capfd.readouterr()
    assert out.endswith("report: run/report.html\n")
    assert "decoupled: epoch 1/1: loss" in err


def test_output_that_cannot_be_written_ends_nothing_that_is_at_work(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    for number, said in ((writer, ""), (os.open("/dev/full", os.O_WRONLY),
                         "halfpass: standard output: expected a place that can be written, found No space left on device; make room there\n")):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Lasting(number, "w"))))
            assert main(["certs", f"keys-{number}"]) == (1 if said else 0)
            sys.stdout.close()
        assert capsys.readouterr().err == said
        assert Path(f"keys-{number}", "client-0.pem").is_file()


def test_a_command_may_be_run_in_any_thread():
    """Signals are the main thread's alone."""
    with ThreadPoolExecutor(1) as aside:
        assert aside.submit(main, ["report", "nothing"]).result() == 2
        aside.submit(leave_when_told).result()


def test_debug_adds_the_traceback(capsys):
    assert main(["train", "--debug", "--wire.codec", "gzip"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith("halfpass: wire.codec: expected")
    assert main(["--debug", "train"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == "halfpass: command: expected the command before its options, found --debug; write the command first"


def test_an_error_reaches_the_process_that_asked():
    """A pool of processes pickles it; one that cannot be built again breaks the pool."""
    for error in (InputError("train.lr", "a number", "none", "give one"), PassedOnError("a reason", 2)):
        again = copy.copy(error)  # as pickle does it
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_a_comparison_leaves_out_what_a_baseline_cannot_have(capsys):
    words = ["--server.replay", "2", "--wire.every", "2", "--methods", "decoupled,conventional,centralized", "--out", "both"]
    assert main(["compare", *QUICK, *words]) == 0
    rows = json.loads(Path("both/compare.json").read_text())["rows"]
    assert [(row["method"], row["replay"], row["every"]) for row in rows] == [("decoupled", 2, 2), ("conventional", 1, 1), ("centralized", None, None)]
    assert Path("both/report.html").is_file()
    said = []
    for more in ([], ["both/decoupled-seed-0"]):  # one that is named twice is no second seed
        capsys.readouterr()
        assert main(["report", "both", *more, "--out", "all.html"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    Path("both/centralized-seed-0/result.json").write_text("junk")
    fails(capsys, ["export", "both/centralized-seed-0"], 2, "both/centralized-seed-0/result.json: expected JSON, found .*")


def test_a_comparison_that_was_broken_off_goes_on(capsys):
    words = ["compare", *QUICK, "--train.epochs", "2", "--server.store", "kept", "--methods", "decoupled,conventional", "--out", "both"]
    assert main(words) == 0
    folders = [Path("both") / f"{method}-seed-0" for method in ("decoupled", "conventional")]
    whole = [{file.name: load_file(file) for file in folder.glob("*.safetensors")} for folder in folders]
    capsys.readouterr()
    fails(capsys, words, 2, "out: expected a folder without a run, found compare.json in both; choose another folder")
    first = (folders[0] / "result.json").stat().st_mtime_ns
    Path("both/compare.json").unlink()  # as if broken off: one finished, one in its first epoch, with uploads in its store
    for name in ("result.json", "server.safetensors"):
        (folders[1] / name).unlink()
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "run 1 of 2: decoupled, seed 0, is there already\n" in said
    assert "run 2 of 2: conventional, seed 0\n" in said
    assert (folders[0] / "result.json").stat().st_mtime_ns == first
    for folder, weights in zip(folders, whole, strict=True):
        found = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
        assert found.keys() == weights.keys()
        assert all(equal(found[name], weights[name]) for name in weights)
    assert len(json.loads(Path("both/compare.json").read_text())["rows"]) == 2
    Path("both/compare.json").unlink()
    fails(capsys, [*words, "--train.lr", "0.1"], 2, "both/decoupled-seed-0: expected a training with train.lr 0.1, found one with 0.2; choose another folder")


@pytest.mark.long
def test_a_comparison_goes_on_behind_the_last_whole_epoch(capsys):
    words = ["compare", *QUICK, "--train.epochs", "30", "--methods", "decoupled", "--out", "both"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which tests in the background ignore
    try:
        child = subprocess.Popen([sys.executable, "-m", "halfpass", *words], stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    for line in child.stderr:
        if "epoch 1/30" in line:
            child.send_signal(signal.SIGINT)
            break
    child.communicate(timeout=60)
    if not Path("both/decoupled-seed-0/result.json").exists():
        assert Path("both/decoupled-seed-0/unfinished.pt").is_file()
    assert main(words) == 0
    epochs = [json.loads(line)["epoch"] for line in Path("both/decoupled-seed-0/metrics.jsonl").read_text().splitlines()]
    assert sorted(set(epochs)) == list(range(1, 31))
    assert "epoch 1/30" not in capsys.readouterr().err


def test_a_default_cut_written_out_is_the_same_run():
    written = Config(model=ModelConfig(cut="block_2"))
    assert setup.agreed_settings(Config()) == setup.agreed_settings(written)
    assert setup.agreed_settings(Config(model=ModelConfig(cut="block_1"))) != setup.agreed_settings(written)


def test_print_config_is_a_config(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--train.lr", "0.25", "--clients.topology", "relay", "--print_config"])
    assert ended.value.code == 0
    read = from_dict({k: v for k, v in yaml.safe_load(capsys.readouterr().out).items() if k in as_dict(Config())})
    assert read.train.lr == 0.25
    assert read.clients.topology == "relay"
    for words in (["join", "127.0.0.1:1"], ["serve"], ["compare"], ["cuts"], ["train"]):
        printed = []
        for more in ([], ["--config", "printed.yaml"]):
            with pytest.raises(SystemExit) as ended:
                main([*words, *more, "--print_config"])
            assert ended.value.code == 0
            printed.append(capsys.readouterr().out)
            Path("printed.yaml").write_text(printed[0])
        assert printed[0] == printed[1]
    with pytest.raises(InputError, match=r"found 'train.epoch'; did you mean 'train.epochs'\?"):
        from_dict({"train": {"epoch": 3}})


def test_an_option_counts_before_a_file_of_settings_too(capsys):
    Path("some.yaml").write_text("model: {name: resnet20, head: conv}")
    Path("more.yaml").write_text("model: {head: mlp}")
    with pytest.raises(SystemExit) as ended:
        main(["join", "--model.name", "digits-cnn", "127.0.0.1:1", "--config", "some.yaml", "--config=more.yaml", "--print_config"])
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert (ended.value.code, model["name"], model["head"]) == (0, "digits-cnn", "mlp")


@pytest.mark.parametrize("command", ["train", "compare", "serve", "join", "resume", "retrain", "report", "export", "cuts", "paper", "agreement", "check"])
def test_help_describes_every_option(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help", "all"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    # an option, what it takes, perhaps its type and default, and a description that begins with a letter
    said = set(re.findall(r"^  (?:-\w, )?--([\w.]+)[^\n(]*?(?:\s{2,}|\n\s{10,})[A-Za-z]", text, re.MULTILINE))
    named = set(re.findall(r"^  (?:-\w, )?--([\w.]+)", text, re.MULTILINE))
    assert named
    assert not named - said
    if command in ("train", "compare", "serve", "join"):
        assert set(flatten(as_dict(Config()))) - named <= {"runtime"}


def test_cuts_lists_what_crosses(capsys):
    assert main(["cuts", "--model.name", "resnet20", "--data.name", "cifar10"]) == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if ", stage_2.2," in line)
    assert "32×16×16" in row
    assert "32.8" in row  # kB per sample: 32·16·16 floats


def test_export_takes_the_client_that_is_asked_for():
    assert main(["train", *QUICK, "--clients.count", "2", "--clients.topology", "independent", "--out", "run"]) == 0
    owned = [load_file(f"run/client-{k}.safetensors") for k in range(2)]
    assert not equal(*owned)
    for k in range(2):
        assert main(["export", "run", "--client", str(k), "--with_head"]) == 0
        joint = load_file("run/joint.safetensors")
        assert equal({name: joint[name.removeprefix("client_half.")] for name in owned[k]}, owned[k])


def test_export_gives_the_accuracy_that_the_run_reported(capsys):
    """Also where all clients hold a half of their own, and for the centralized network."""
    for name, extra in [
        ("relay", ["--clients.count", "2", "--clients.topology", "relay", "--train.batch_size", "32"]),
        ("central", ["--method", "centralized"]),
        ("bf16", ["--train.precision", "bf16", "--method", "conventional"]),
    ]:
        assert main(["train", *QUICK, *extra, "--out", name]) == 0
        reported = json.loads(Path(name, "result.json").read_text())
        capsys.readouterr()
        assert main(["export", name]) == 0
        percent = f"{100 * reported['test_accuracy']:.2f} %"
        assert f"test accuracy {percent}, the run reported {percent}" in capsys.readouterr().out
        if name == "relay":
            assert main(["export", name, "--with_head"]) == 0
            percent = f"{100 * reported['joint_test_accuracy']:.2f} %"
            said = f"wrote relay/joint.safetensors: test accuracy {percent}, the run reported {percent}"
            assert said in capsys.readouterr().out
        else:
            fails(capsys, ["export", name, "--with_head"], 2, f"{name}, method: expected decoupled, which has a head, found .*")
    Path("relay/server.safetensors").unlink()
    fails(capsys, ["export", "relay"], 2, "relay/server.safetensors: expected weights that the run saved, found none; .*")
