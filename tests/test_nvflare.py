"""A run on NVFlare: what a job is made of, what becomes of calls to sites, and one simulated job beside one process."""

import json
import threading
import time

import pytest
from runtimes import rows_of
from test_rounds import check_equal, settings

from halfpass.config import as_dict, flatten
from halfpass.errors import InputError, RunError

pytest.importorskip("nvflare")

from nvflare.collab import CollabCallError

from halfpass.nvflare import exchange, job
from halfpass.nvflare.__main__ import main
from halfpass.nvflare.exchange import CollabExchange
from halfpass.run.train import train

SMALL = {"data.limit": 300, "clients.count": 2, "train.epochs": 1}


class Site:
    """A proxy of NVFlare's: called with options, it has the site's functions."""

    def __init__(self, name, answer):
        self.name, self.answer, self.seconds = name, answer, None

    def __call__(self, timeout):
        self.seconds = timeout
        return self


def raising(error):
    def answer(*_):
        raise error

    return answer


def test_a_call_to_one_site_goes_on_beside_another_s():
    slow = threading.Event()
    sites = {0: Site("a", lambda message: slow.wait(10) and b"late"), 1: Site("b", lambda message: message + b"!")}
    calls = CollabExchange(sites, 5.0, lambda: False)
    calls.send(0, b"one")
    calls.send(1, b"two")
    assert calls.receive(10).data == b"two!"
    assert calls.receive(0) is None
    slow.set()
    reply = calls.receive(10)
    assert (reply.node, reply.data, reply.failure, sites[0].seconds) == (0, b"late", "", 5.0)
    calls.close()


FAILURES = {
    "a call that took too long": (CollabCallError("a", "answer", TimeoutError("function answer timed out")), "site a: function answer timed out", True),
    "a site that cannot be reached": (CollabCallError("a", "answer", "target_unreachable"), "site a: target_unreachable", True),
    "an error at the site": (CollabCallError("a", "answer", "KeyError", remote_traceback="Traceback"), "site a: KeyError", False),
    "an error here": (ValueError("no"), "site a: ValueError('no')", False),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_what_becomes_of_a_call_that_fails(monkeypatch, failure):
    error, said, again = FAILURES[failure]
    calls = CollabExchange({0: Site("a", raising(error)), 1: Site("b", raising(error))}, 5.0, lambda: False)
    calls.send(0, b"")
    reply = calls.receive(10)
    assert (reply.node, reply.failure, reply.again) == (0, said, again)
    assert list(calls.nodes()) == [1]  # it is not called again at once
    later = time.monotonic() + exchange.PAUSE_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert list(calls.nodes()) == [0, 1]


def test_what_is_no_answer_and_a_job_that_is_aborted():
    aborted = []
    calls = CollabExchange({0: Site("a", lambda message: None)}, 5.0, lambda: bool(aborted))
    calls.send(0, b"")
    assert calls.receive(10).failure == "site a answered NoneType, not bytes"
    aborted.append(True)
    with pytest.raises(RunError, match="NVFlare: expected a job that goes on, found it was aborted"):
        calls.receive(0)


def exported(folder, *what):
    job.recipe(*what).export(str(folder))
    (out,) = folder.iterdir()
    return out


def test_a_job_names_its_sites_and_carries_no_code_of_halfpass_s(tmp_path):
    folder = exported(tmp_path, SMALL, ["north", "south"])
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["min_clients"], meta["deploy_map"]) == (2, {"app_server": ["server"], "app_north": ["north"], "app_south": ["south"]})
    for number, site in enumerate(("north", "south")):
        (executor,) = json.loads((folder / f"app_{site}/config/config_fed_client.json").read_text())["executors"]
        arguments = executor["executor"]["args"]
        assert (arguments["props"], arguments["max_inbound_call_threads"]) == ({"client": number}, 1)
    assert not list(folder.rglob("*.py"))


def test_a_user_s_own_code_goes_with_the_job(tmp_path):
    (tmp_path / "mine.py").write_text("def network(sample_shape, outputs): ...\n")
    folder = exported(tmp_path / "job", SMALL, [], [str(tmp_path / "mine.py")])
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.py")) == [f"app_{site}/custom/mine.py" for site in ("server", "site-1", "site-2")]


@pytest.mark.parametrize(("changes", "sites", "said"), [
    ({"train.epoch": 2}, [], r"configuration: expected a known key, found 'train.epoch'; did you mean 'train.epochs'"),
    ({"train.epochs": "two"}, [], r"train.epochs: expected a whole number"),
    ({"runtime": "local"}, [], r"runtime: expected none on NVFlare, whose processes are its own, found 'local'"),
    ({"method": "conventional"}, [], r"method: expected decoupled in rounds"),
    ({}, ["site-1"], r"sites: expected 2 names of sites, one for each client, found 'site-1'"),
    ({}, ["a", "a"], r"sites: expected 2 names of sites, one for each client, found 'a', 'a'"),
])  # fmt: skip
def test_what_cannot_be_used_is_refused_before_a_job_starts(changes, sites, said):
    with pytest.raises(InputError, match=said):
        job.recipe(SMALL | changes, sites)


def test_the_command_says_what_is_wrong_and_ends_with_2(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("clients: {count: 2}\ntrain: {epoch: 1}\n")
    for words, said in (
        ([str(file)], "halfpass: configuration: expected a known key, found 'train.epoch'; did you mean 'train.epochs'?"),
        ([str(tmp_path / "none.yaml")], "halfpass: config: expected a YAML file, found none at"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err
    file.write_text("clients: {count: 2}\n")
    assert main([str(file), "--kit", str(tmp_path)]) == 2
    assert "halfpass: kit: expected an admin's startup kit, found none in" in capsys.readouterr().err
    assert main([str(file), "--file", str(tmp_path / "gone.py")]) == 2
    assert "halfpass: files: expected code to send along, found none at" in capsys.readouterr().err


def test_a_kit_is_told_to_allow_halfpass_once(tmp_path, capsys):
    local = tmp_path / "local"
    local.mkdir()
    (local / "resources.json.default").write_text(json.dumps({"class_allow_list": ["theirs."], "other": 1}))
    for _ in range(2):
        assert main(["--allow", str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"wrote {local / 'resources.json'}\n"
        assert json.loads((local / "resources.json").read_text()) == {
            "class_allow_list": ["theirs.", "halfpass.nvflare.", "nvflare.collab."], "other": 1,
        }  # fmt: skip
    (local / "resources.json").write_text("[]")
    for folder in (tmp_path, tmp_path / "none"):
        assert main(["--allow", str(folder)]) == 2
        assert f"halfpass: --allow: expected the startup kit of a server or a site, found none in {folder}" in capsys.readouterr().err
    for words in ([], ["run.yaml", "--allow", str(tmp_path)]):
        with pytest.raises(SystemExit, match="2"):
            main(words)
        assert "give CONFIG, or --allow KIT alone" in capsys.readouterr().err


def test_a_simulated_job_and_one_process_give_equal_weights_and_scores(tmp_path):
    config = settings(tmp_path / "local", rounds=2)
    one = train(config)
    given = {key: value for key, value in flatten(as_dict(config)).items() if key != "runtime"}
    out = job.simulate(given | {"out": str(tmp_path / "job")})
    check_equal(config, tmp_path / "local", out)
    other = json.loads((out / "result.json").read_text())
    assert (other["engine"], other["test_accuracy"]) == ("nvflare", one["test_accuracy"])
    assert [row["process"] for row in rows_of(tmp_path / "local")] == [row["process"] for row in rows_of(out)]
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("fails", [True, False], ids=["NVFlare says so", "nothing was written"])
def test_a_job_that_fails_is_no_success(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(job.SimEnv, "deploy", raising(RuntimeError("return code 2")) if fails else lambda *_: "job")
    found = "return code 2" if fails else "no result.json"
    with pytest.raises(RunError, match=f"the job: expected a finished run in {tmp_path / 'out'}, found {found}; see what it said above"):
        job.simulate(SMALL | {"out": str(tmp_path / "out")})
