"""The `halfpass` command. Options, help and YAML come from the dataclasses of `halfpass/config.py`.

Exit status: 0 done, 1 the run failed, 2 the arguments were wrong. An error is one line on standard error; `--debug`
adds the traceback.
"""

import argparse
import atexit
import dataclasses
import gc
import json
import logging
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from rich.console import Console

from halfpass.commands.answer import answer_here
from halfpass.commands.arguments import Known, check_config, check_words, reworded
from halfpass.commands.card import write_card
from halfpass.commands.certs import make_certificates
from halfpass.commands.check import Where, check
from halfpass.commands.completion import INSTALL, SHELLS, check_shell, completion_script
from halfpass.commands.cuts import AFFORD, print_cuts
from halfpass.commands.export import FORMATS, export
from halfpass.commands.grid import choose, grid_rows, read_grid, read_pairs, run_grid
from halfpass.commands.help import help_text, topic_of
from halfpass.commands.joining import join_command
from halfpass.commands.live_report import show_live
from halfpass.commands.new import print_new
from halfpass.commands.predict import Wanted, predict
from halfpass.commands.report import find_runs, write_for_paper
from halfpass.commands.retrain import retrain
from halfpass.commands.status import as_json, show, watch
from halfpass.commands.streams import lost_output, outlive
from halfpass.config import Config, LogConfig, TlsConfig, from_dict, named_code, number_keys
from halfpass.data.workers import draw_beside_threads
from halfpass.errors import HalfpassError, InputError, RunError, room_remedy
from halfpass.files import at_home, refuse_file, write_json
from halfpass.plugin import origin
from halfpass.report.outputs import PAGE, refuse_output
from halfpass.report.page import write_report
from halfpass.report.runs import make_series, read_run, summary
from halfpass.report.tables import rich_table
from halfpass.report.verdict import verdict
from halfpass.run import children, logs
from halfpass.run.children import INTERRUPTED, Left, be_interruptible, describe, leave_when_told
from halfpass.run.client_process import agreement, join
from halfpass.run.credentials import trust_to_ask
from halfpass.run.metrics import listening
from halfpass.run.ranks import Ranks, several
from halfpass.run.records import JOINED, SERVED, command_line, default_folder, environment, read_config, read_where
from halfpass.run.server_process import serve
from halfpass.run.train import between_processes, compare, read_methods, read_seeds, resume, train, with_folder
from halfpass.wire.asking import ask_status
from halfpass.wire.halfpass_pb2 import StatusReply

LOG = logging.getLogger("halfpass")
DEFAULT_BIND = "127.0.0.1:7465"

# What is imported stays: Python's collector need not look through all of it again and again, nor at the end, where that
# takes a second.
gc.freeze()
atexit.register(gc.freeze)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    outlive()
    try:
        be_interruptible()
        options = _parse(words)
        if options.subcommand not in ("serve", "resume"):
            _refuse_several(options.subcommand)
        COMMANDS[options.subcommand].run(options[options.subcommand])
        if (lost := lost_output()) is not None:
            expected, remedy = "a place that can be written", room_remedy(lost, "give another")
            raise RunError("standard output", expected, str(lost.strerror), remedy)
    except (Exception, KeyboardInterrupt, Left) as error:
        if "--debug" in words and not logs.in_json():
            traceback.print_exc()
        if children.IS_CHILD and isinstance(error, KeyboardInterrupt):
            return INTERRUPTED  # its parent says what there is to say
        if line := describe(error):
            left = isinstance(error, Left) and not error.why
            level, event = (logging.INFO, "left") if left else (logging.ERROR, "failed")
            logs.say(line, level, event=event, traceback="--debug" in words)
        if isinstance(error, Left):
            signal.setitimer(signal.ITIMER_REAL, 0)
            return 1 if error.why else 0
        return error.exit_status if isinstance(error, HalfpassError) else 1
    return 0


# ------------------------------------------------------------------------------------------------------ the commands


def _refuse_several(what: str) -> None:
    """Of processes that torchrun started, all would do the same in one folder."""
    if several():
        expected, remedy = "halfpass serve, or resume of a server", "start one process, without torchrun"
        raise InputError("torchrun with several processes", expected, f"halfpass {what}", remedy)


def _train(options: Namespace) -> None:
    config = with_folder(options.config_object)
    train(config, debug=options.debug)
    _report_own([config.folder])


def _resume(options: Namespace) -> None:
    run = _path("RUN", options.run)
    clients = sorted(file.parent for file in run.glob(f"client-*/{JOINED}"))
    if options.client is not None or (clients and not (run / "config.yaml").is_file()):
        return _resume_client(run, clients, options)
    given = read_config(run) if (run / "config.yaml").is_file() else Config()
    if (run / SERVED).is_file():
        logs.begin(given.log)
    _check_code(run, given, options.allow_code)
    if (run / SERVED).is_file() and not (run / "result.json").is_file():
        config = dataclasses.replace(given, out=str(run))
        said = read_where(run / SERVED, "bind")
        _serve_run(config, options.bind or said["bind"], said["above"], insecure=said["insecure"], again=True)
        return None
    _refuse_several("resume of something else")
    resume(run, debug=options.debug)
    return _report_own([run])


def _resume_client(run: Path, clients: list[Path], options: Namespace) -> None:
    """A client that was started by hand, and has its state in a folder of its own."""
    _refuse_several("resume of a client")
    numbers = {int(folder.name.removeprefix("client-")): folder for folder in clients}
    chosen = next(iter(numbers)) if options.client is None and len(numbers) == 1 else options.client
    if chosen not in numbers:
        found = ", ".join(map(str, sorted(numbers))) or "none"
        raise InputError("--client", f"a client that joined from {run}", found, "give the number of one with --client")
    own = numbers[chosen]
    config = dataclasses.replace(read_config(own), out=str(run))
    logs.begin(config.log)
    _check_code(own, config, options.allow_code)
    said = read_where(own / JOINED, "address")
    _join_run(config, said["address"], chosen, insecure=said["insecure"], again=True)


def _compare(options: Namespace) -> None:
    config: Config = options.config_object
    methods = read_methods(options.methods)
    seeds = [config.train.seed] if options.seeds is None else read_seeds(options.seeds)
    runs = compare(config, methods, seeds, debug=options.debug)
    _report_own(runs, runs[0].parent)


def _serve(options: Namespace) -> None:
    config = between_processes(with_folder(options.config_object))
    files = [str(file) for file in options.config or ()]
    _serve_run(config, options.bind, options.above, insecure=options.insecure, again=options.resume, files=files)


def _serve_run(
    config: Config, bind: str, above: str | None, *, insecure: bool, again: bool, files: Sequence[str] = ()
) -> None:
    host = bind.rpartition(":")[0]

    def announce(port: int) -> None:
        address = f"{host}:{port}"
        command = join_command(config, address, insecure=insecure, files=files)
        print(f"listening on {address} for {config.clients.count} client(s): {command}", flush=True)
        if not children.IS_CHILD:
            LOG.info("listening on %s", address, extra={"event": "listening", "address": address})

    logs.begin(config.log, quiet=children.IS_CHILD)
    ranks = Ranks(config) if several() else None
    if ranks is not None and ranks.rank > 0:
        ranks.follow()
        return
    if not children.IS_CHILD:
        leave_when_told()
    with listening(config.metrics) as register, nullcontext() if ranks is None else ranks:
        serve(config, bind, announce, above, insecure=insecure, again=again, register=register, ranks=ranks)
    _say_done(config.folder)
    _report_own([config.folder])


def _say_done(folder: Path) -> None:
    if not children.IS_CHILD:
        LOG.info("done: %s", folder, extra={"event": "done", "folder": str(folder)})


def _status(options: Namespace) -> None:
    tls = TlsConfig(**options.tls.as_dict())

    def ask() -> StatusReply:
        return ask_status(options.address, trust_to_ask(tls), insecure=options.insecure)

    if options.watch:
        watch(ask)
    elif options.json:
        print(as_json(ask()))
    else:
        show(ask())


def _certs(options: Namespace) -> None:
    if not options.folder:
        raise InputError("DIR", "the name of a folder", "none", "for example keys")
    folder = _path("DIR", options.folder)
    hosts = [host.strip() for host in (options.hosts or "").split(",") if host.strip()]
    files = make_certificates(
        folder, clients=options.clients, hosts=hosts, edge=options.edge, days=options.days, tokens=options.tokens
    )  # fmt: skip
    print("\n".join(f"wrote {file}" for file in files) or f"all of it is in {folder} already")
    kind = "token" if options.tokens else "pem and client-N-key.pem"
    edge = "authority.pem, edge.pem and edge-key.pem to the edge, " if options.edge else ""
    print(
        f"Copy authority.pem, server.pem, server-key.pem{' and tokens' if options.tokens else ''} to the server, "
        f"{edge}authority.pem and client-N.{kind} to client N, each into a folder for --tls.folder. "
        "authority-key.pem makes certificates: keep it away from all of them."
    )  # fmt: skip


def _join(options: Namespace) -> None:
    config = between_processes(with_folder(options.config_object))
    _join_run(
        config, options.address, options.client, insecure=options.insecure, again=options.resume, wait=options.wait
    )


def _agreement(options: Namespace) -> None:
    config = between_processes(options.config_object)
    print(json.dumps(agreement(config, options.client), indent=2))


def _join_run(
    config: Config, address: str, client: int, *, insecure: bool, again: bool, wait: float = 0.0
) -> None:
    draw_beside_threads()
    if not children.IS_CHILD:
        logs.begin(config.log)
        leave_when_told()
    with listening(config.metrics) as register:
        folder = join(config, address, client, insecure=insecure, again=again, wait=wait, register=register)
    _say_done(folder)
    if not children.IS_CHILD:
        print(f"saved {folder / f'client-{client}.safetensors'}")


def _retrain(options: Namespace) -> None:
    run, config = _path("RUN", options.run), options.config_object
    _check_code(run, config, options.allow_code)
    config = dataclasses.replace(config, out=config.out or f"{default_folder(config)}-retrained")
    retrain(run, config)
    _report_own([config.folder])


def _paper(options: Namespace) -> None:
    out, results = _path("--out", options.out), _path("--results", options.results) if options.results else None
    grid = read_grid(_path("GRID", options.grid), out, read_pairs("--set", options.set))
    members = choose(grid, options.only)
    if results is not None:
        refuse_file("--results", results)
    made = {"environment": environment(), "command": command_line("halfpass")}

    def write_rows() -> None:
        rows = grid_rows(grid)  # of what was not chosen this time, too
        if results is not None and rows:
            write_json(results, {**made, "rows": rows})

    try:
        run_grid(members, options.jobs, write_rows)
    except RunError:
        with suppress(HalfpassError):  # the first error is the one to say
            _report_on([member.folder for member in members if member.finished], out / "report.html")
        raise
    _report_on([member.folder for member in members], out / "report.html")


def _report(options: Namespace) -> None:
    def runs() -> list[Path]:
        return find_runs([_path("RUN", name) for name in options.runs])

    asked = [_path(f"--{name}", options[name]) if options[name] else None for name in ("figures", "csv", "latex")]
    out = _path("--out", options.out)
    if options.live:
        refuse_output("--out", out, PAGE)
        if not show_live(runs, lambda address: print(f"live report: {address} (Ctrl-C ends it)", flush=True)):
            return
    found = runs()
    written = write_for_paper(found, out, *asked)
    _report_on(found, out)
    for file in written:
        print(f"wrote {file}")


def _report_own(runs: list[Path], folder: Path | None = None) -> None:
    """Of the runs that this command made, in the first one's folder or the one that is given; a child leaves it to its
    parent."""
    if not children.IS_CHILD:
        edges = [run / "edge" for run in runs]  # of chains, whose lower link is a run of its own
        runs = runs + [edge for edge in edges if (edge / "result.json").is_file()]
        _report_on(runs, (folder or runs[0]) / "report.html")


def _report_on(runs: list[Path], out: Path) -> None:
    file = write_report(runs, out)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a pipe has no width, and the default would break the columns
    read = [read_run(run) for run in runs]
    console.print(rich_table([summary(run) for run in read]))
    for line in verdict(make_series(read)):
        console.print(line, highlight=False)
    print(f"report: {file}")


def _export(options: Namespace) -> None:
    run, out = _path("RUN", options.run), _path("--out", options.out) if options.out else None
    _check_code(run, read_config(run) if (run / "config.yaml").is_file() else Config(), options.allow_code)
    parts = [_path("--parts", part) for part in options.parts]
    exported = export(
        run, options.client, out, data_path=options.data_path, with_head=options.with_head, form=options.format,
        parts=parts,
    )  # fmt: skip
    print(f"wrote {exported.file}: {exported.remark}")


def _predict(options: Namespace) -> None:
    if options.json and options.csv:
        raise InputError("--json", "one form of output", "--csv too", "leave one of them out")
    form = "json" if options.json else "csv" if options.csv else "text"
    out = _path("--out", options.out) if options.out else None
    if out is not None:
        refuse_file("--out", out)
    wanted = Wanted(
        [_path("RUN", options.run), *(_path("--parts", part) for part in options.parts)],
        [_path("INPUT", name) for name in options.inputs], options.test, options.client, options.server,
        options.exit_above, options.data_path, options.allow_code, options.insecure,
    )  # fmt: skip
    predict(wanted, TlsConfig(**options.tls.as_dict()), form, out)


def _answer(options: Namespace) -> None:
    tls, log = TlsConfig(**options.tls.as_dict()), LogConfig(**options.log.as_dict())
    answer_here(
        [_path("RUN", options.run)], options.bind, tls, log, insecure=options.insecure, allow_code=options.allow_code
    )  # fmt: skip


def _card(options: Namespace) -> None:
    run = _path("RUN", options.run)
    out = _path("--out", options.out) if options.out else run / "README.md"
    write_card([run, *(_path("--parts", part) for part in options.parts)], out)
    print(f"wrote {out}: look for TODO")


def _path(place: str, text: str) -> Path:
    return Path(at_home(place, text))


def _check_code(run: Path, config: Config, allowed: bool) -> None:
    """Says what the settings of a run folder will import; refuses it unless it is allowed, for the folder may be
    another's."""
    given = read_config(run) if (run / "config.yaml").is_file() else config
    for key, name in named_code(config).items():
        if named_code(given).get(key) != name:
            continue  # it was named on the command line
        found = f"{name} from {origin(name)}"
        if not allowed:
            remedy = "look at it, and add --allow_code where you trust it"
            raise InputError(f"{run / 'config.yaml'}, {key}", "no code that is run unasked", found, remedy)
        logs.say(f"importing {found}, which {run / 'config.yaml'} names as {key}")


def _cuts(options: Namespace) -> None:
    print_cuts(options.config_object, options.afford, options.numbers)


def _new(options: Namespace) -> None:
    print_new(_path("DIR", options.folder))


def _check(options: Namespace) -> None:
    where = Where(**{field.name: options[field.name] for field in dataclasses.fields(Where)})
    check(options.settings, where, insecure=options.insecure)


def _completion(options: Namespace) -> None:
    check_shell(options.shell)
    print(completion_script(_parser(None, with_help=True, whole=True)[0], options.shell))


# ------------------------------------------------------------------------------------------------------- the options


@dataclass(frozen=True)
class Command:
    run: Callable[[Namespace], None]
    help: str
    add_options: Callable[[ArgumentParser], None]


def _add_config(parser: ArgumentParser) -> None:
    parser.add_class_arguments(Config)
    parser.add_argument("--config", action="config", help="YAML file with the same keys as the options.")


def _add_resume(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, metavar="RUN", help="Folder of a training, a server or a client.")
    parser.add_argument("--client", type=int, default=None, help="Which client, of several that joined from there.")
    where = "HOST:PORT for a server to listen on. Default: where it did."
    parser.add_argument("--bind", type=str, default=None, help=where)
    _add_allow_code(parser)


def _add_allow_code(parser: ArgumentParser) -> None:
    may = "Run the code that the folder's config.yaml names as module:function, after a look at it: it can do anything."
    parser.add_argument("--allow_code", action="store_true", help=may)


def _add_compare(parser: ArgumentParser) -> None:
    _add_config(parser)
    methods = "decoupled,conventional,centralized"
    parser.add_argument("--methods", default=methods, help="Methods to compare, separated by commas.")
    parser.add_argument("--seeds", type=str, default=None, help="Seeds, separated by commas. Default: train.seed.")


def _add_serve(parser: ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--bind", default=DEFAULT_BIND, help="HOST:PORT to listen on; port 0 takes a free one.")
    above = "HOST:PORT of the server above; makes this the edge of a run with model.edge_cut."
    parser.add_argument("--above", type=str, default=None, help=above)
    _add_insecure(parser)
    _add_again(parser)


def _add_again(parser: ArgumentParser) -> None:
    may = "Go on with the run that was broken off in --out; begin it where there is none yet."
    parser.add_argument("--resume", action="store_true", help=may)


def _add_insecure(parser: ArgumentParser) -> None:
    may = "Talk to other machines without TLS: whoever is between sees and may change activations and labels."
    parser.add_argument("--insecure", action="store_true", help=may)


def _add_certs(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=str, metavar="DIR", help="Folder to write to; an authority in it is used again.")
    parser.add_argument("--clients", type=int, default=1, help="Number of clients.")
    hosts = "Names and addresses of the server, separated by commas, as clients will write them; loopback is added."
    parser.add_argument("--hosts", type=str, default=None, help=hosts)
    parser.add_argument("--edge", action="store_true", help="Also a certificate for the edge of a run with one.")
    parser.add_argument("--days", type=int, default=90, help="How long the certificates are valid.")
    parser.add_argument("--tokens", action="store_true", help="Clients get tokens instead of certificates.")


def _add_join(parser: ArgumentParser) -> None:
    parser.add_argument("address", type=str, help="HOST:PORT of the server.")
    parser.add_argument("--client", type=int, default=0, help="Number of this client, from 0.")
    wait = "Seconds for which a server is waited for that is not there yet. Default: 10 seconds."
    parser.add_argument("--wait", type=float, default=0.0, help=wait)
    _add_insecure(parser)
    _add_again(parser)
    _add_config(parser)


def _add_agreement(parser: ArgumentParser) -> None:
    parser.add_argument("--client", type=int, default=0, help="Number of the client, from 0.")
    _add_config(parser)


def _add_status(parser: ArgumentParser) -> None:
    parser.add_argument("address", type=str, help="HOST:PORT of the server.")
    parser.add_class_arguments(TlsConfig, "tls")
    may = "Ask another machine without TLS."
    parser.add_argument("--insecure", action="store_true", help=may)
    parser.add_argument("--json", action="store_true", help="All of it as JSON.")
    parser.add_argument("--watch", action="store_true", help="Ask again each second, until Ctrl-C or the run's end.")


def _add_retrain(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, metavar="RUN", help="Folder of a run that kept its uploads (server.store).")
    _add_allow_code(parser)
    _add_config(parser)


def _add_paper(parser: ArgumentParser) -> None:
    parser.add_argument("grid", type=str, metavar="GRID", help="Grid file, such as examples/paper/small.yaml.")
    pairs: dict[str, Any] = {"nargs": "*", "action": "extend", "type": str, "default": []}
    parser.add_argument("--set", **pairs, metavar="KEY=VALUE", help="Settings of all trainings, such as data.path=DIR.")
    only = "Only these trainings, such as cut=deep seed=0 seed=1; of an axis that comes twice, either choice."
    parser.add_argument("--only", **pairs, metavar="AXIS=CHOICE", help=only)
    parser.add_argument("--jobs", type=int, default=2, help="Trainings at a time; they share the cores, or one GPU.")
    parser.add_argument("--out", type=str, default="runs/paper", help="Folder for all runs; finished ones are kept.")
    parser.add_argument("--results", type=str, default=None, help="JSON file to write all rows to, as they come.")


def _add_report(parser: ArgumentParser) -> None:
    runs = "Run folders, or folders with runs in them: a comparison's, a grid's, or one of several comparisons."
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN", help=runs)
    parser.add_argument("--out", type=str, default="report.html", help="HTML file to write.")
    for_paper = "Folder to write each figure to, as SVG and PDF, one and two columns of a paper wide."
    parser.add_argument("--figures", type=str, default=None, metavar="DIR", help=for_paper)
    numbers = "CSV file to write: a row for each line of the table, mean and standard deviation of each measure."
    parser.add_argument("--csv", type=str, default=None, metavar="FILE", help=numbers)
    parser.add_argument("--latex", type=str, default=None, metavar="FILE", help="LaTeX table to write, with booktabs.")
    may = "Serve a page on this machine that keeps up with runs that go on; the file is written once they are finished."
    parser.add_argument("--live", action="store_true", help=may)


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, metavar="RUN", help="Folder of a finished run, with all halves in it.")
    parser.add_argument("--client", type=int, default=0, help="Whose client half to join (independent clients differ).")
    parser.add_argument("--with_head", action="store_true", help="Let the auxiliary head answer too: the mean of both.")
    forms = "safetensors; state, a state dict of PyTorch (.pt); or onnx, the joined network and each half."
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=forms)
    _add_parts(parser)
    parser.add_argument("--out", type=str, default=None, help="File to write, of ONNX a folder. Default: RUN/model, "
                        "or RUN/joint with the head, .safetensors or .pt; RUN/onnx.")  # fmt: skip
    place = "The test set's place, where it is not the run's."
    parser.add_argument("--data_path", "--data.path", type=str, default=None, help=place)
    _add_allow_code(parser)


def _add_parts(parser: ArgumentParser) -> None:
    further = "Further folders, where the files of other owners lie: sites', an edge's."
    parser.add_argument("--parts", type=str, nargs="+", default=[], metavar="FOLDER", help=further)


def _add_predict(parser: ArgumentParser) -> None:
    run = "Folder of a finished run, with all halves in it; with --server a client's own folder is enough."
    parser.add_argument("run", type=str, metavar="RUN", help=run)
    inputs = "Picture files, a CSV file, or an .npy or .npz file, as the run's training data were."
    parser.add_argument("inputs", nargs="*", type=str, metavar="INPUT", help=inputs)
    parser.add_argument("--test", action="store_true", help="The run's own test set instead, and the score on it.")
    place = "The test set's place, where it is not the run's."
    parser.add_argument("--data_path", "--data.path", type=str, default=None, help=place)
    parser.add_argument("--client", type=int, default=0, help="Whose client half (independent clients differ).")
    parser.add_argument("--json", action="store_true", help="Print JSON, with all probabilities.")
    parser.add_argument("--csv", action="store_true", help="Print CSV, a row for each input.")
    parser.add_argument("--out", type=str, default=None, help="File to write to, instead of standard output.")
    parser.add_argument("--server", type=str, default=None, help="HOST:PORT of a server half (halfpass answer).")
    sure = "The auxiliary head answers by itself where its largest probability is at least this, such as 0.9."
    parser.add_argument("--exit_above", type=float, default=None, help=sure)
    _add_parts(parser)
    parser.add_class_arguments(TlsConfig, "tls")
    _add_insecure(parser)
    _add_allow_code(parser)


def _add_answer(parser: ArgumentParser) -> None:
    run = "Folder with the server half of a finished run; no other's files are needed."
    parser.add_argument("run", type=str, metavar="RUN", help=run)
    parser.add_argument("--bind", default=DEFAULT_BIND, help="HOST:PORT to listen on; port 0 takes a free one.")
    parser.add_class_arguments(TlsConfig, "tls")
    parser.add_class_arguments(LogConfig, "log")
    _add_insecure(parser)
    _add_allow_code(parser)


def _add_card(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, metavar="RUN", help="Folder of a finished run.")
    _add_parts(parser)
    parser.add_argument("--out", type=str, default=None, help="Markdown file to write. Default: RUN/README.md.")


def _add_cuts(parser: ArgumentParser) -> None:
    afford = "Per cent of the computing that the client can afford, head included: what is recommended depends on it."
    parser.add_argument("--afford", type=float, default=AFFORD, help=afford)
    parser.add_argument("--numbers", action="store_true", help="A table of all numbers, too.")
    _add_config(parser)
    figure = next(action for action in parser._actions if action.dest == "out")
    figure.help = "Figure to write: a file that ends in .svg, .pdf or .png. Default: none."


def _add_new(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=str, metavar="DIR", help="Folder to write, new or empty.")


def _add_check(parser: ArgumentParser) -> None:
    parser.add_class_arguments(Where)
    _add_insecure(parser)
    _add_config(parser)


def _add_completion(parser: ArgumentParser) -> None:
    shells = f"{', '.join(SHELLS)}. To install: {INSTALL}"
    parser.add_argument("shell", type=str, metavar="SHELL", help=shells)


COMMANDS = {
    "new": Command(_new, "Write a folder with a network, data and settings of your own, to begin with.", _add_new),
    "check": Command(_check, "Find all that is wrong before anything starts, and take a step.", _add_check),
    "train": Command(_train, "Train by one method and write a run folder.", _add_config),
    "compare": Command(_compare, "Train by several methods and seeds: one table, one report.", _add_compare),
    "resume": Command(_resume, "Go on with a training, a server or a client that was broken off.", _add_resume),
    "serve": Command(_serve, "Be the server of one run, for clients that join by hand.", _add_serve),
    "join": Command(_join, "Be one client of a run.", _add_join),
    "agreement": Command(_agreement, "Print what a client in another language says at joining.", _add_agreement),
    "status": Command(_status, "Ask a server who is there, how far the run is, and how fast.", _add_status),
    "certs": Command(_certs, "Make certificates for a run between machines.", _add_certs),
    "retrain": Command(_retrain, "Train a new server half from the uploads that a run kept; no client.", _add_retrain),
    "paper": Command(_paper, "Train every combination that a grid file names; goes on where it stopped.", _add_paper),
    "report": Command(_report, "Draw run folders as one HTML page.", _add_report),
    "export": Command(_export, "Join the saved halves of a run into one network, and test it.", _add_export),
    "predict": Command(_predict, "Predict with a trained network: pictures, a table, arrays.", _add_predict),
    "answer": Command(_answer, "Answer with the server half of a finished run, for halfpass predict.", _add_answer),
    "card": Command(_card, "Write a model card of a finished run, in Markdown.", _add_card),
    "cuts": Command(_cuts, "Draw every place where a network can be cut, and say which to take.", _add_cuts),
    "completion": Command(_completion, "Print a script with which a shell completes all of this.", _add_completion),
}  # fmt: skip


def _parser(
    chosen: str | None, with_help: bool, whole: bool = False
) -> tuple[ArgumentParser, ArgumentParser | None]:
    """The whole command's parser and the chosen command's. Of the others it knows the names alone, unless the `whole`
    is wanted, and without help not what the settings mean: to read all of it takes a second."""
    set_parsing_settings(docstring_parse_attribute_docstrings=with_help)
    description = "Split learning in which only the forward pass crosses the wire."
    parser = ArgumentParser(prog="halfpass", description=description, exit_on_error=False, allow_abbrev=False,
                            version=metadata.version("halfpass"))  # fmt: skip
    subcommands = parser.add_subcommands(metavar="COMMAND")
    of_chosen = None
    for name, command in COMMANDS.items():
        child = ArgumentParser(description=command.help, exit_on_error=False, allow_abbrev=False)
        if whole or name == chosen:
            command.add_options(child)
            child.add_argument("--debug", action="store_true", help="Show the traceback of an error.")
            of_chosen = child
        subcommands.add_subcommand(name, child, help=command.help)
    return parser, of_chosen


def _parse(words: list[str]) -> Namespace:
    """Options of one command; `config_object` in them is the Config, where the command takes one."""
    words = [_spelled_out(word) for word in _with_run_settings(_configs_first(_file_first(words)))]
    topic, command = topic_of(words), next((word for word in words if word in COMMANDS), None)
    parser, child = _parser(command, topic is not None or any(word.startswith("--print_") for word in words))
    if words and words[0].startswith("-") and words[0].partition("=")[0] not in _option_names(parser):
        raise InputError("command", "the command before its options", words[0], "write the command first")
    if topic is not None and child is not None:
        print(help_text(str(command), child, topic), end="")
        raise SystemExit(0)
    known = Known(list(COMMANDS), _option_names(child) if child else [])
    check_words(words, number_keys())
    for word in words:
        if child is not None and (file := word.partition("--config=")[2]):
            check_config(Path(file), [action.dest for action in child._actions])
    try:
        options = parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise reworded(str(error), known) from error
    chosen = options[options.subcommand]
    if "method" in chosen:
        values = chosen.as_dict()
        chosen.settings = {field.name: values[field.name] for field in dataclasses.fields(Config)}
        if options.subcommand != "check":  # which says all that is wrong
            chosen.config_object = from_dict(chosen.settings)
    return options


def _file_first(words: list[str]) -> list[str]:
    """`check FILE` is `check --config FILE`."""
    if words[:1] == ["check"] and len(words) > 1 and not words[1].startswith("-"):
        return ["check", "--config", *words[1:]]
    return words


def _configs_first(words: list[str]) -> list[str]:
    """`--config FILE` before all other options, which so count wherever they stand; ~ in FILE is made a home folder."""
    files, others, rest = list[str](), list[str](), iter(words)
    for word in rest:
        file = word.partition("--config=")[2]
        if word == "--config" and (file := next(rest, "")).startswith("-"):  # a value is missing: the library says so
            others += [word, file]
        elif file:
            files.append(f"--config={at_home('config', file)}")
        else:
            others.append(word)
    options = next((i for i, word in enumerate(others) if word.startswith("-")), len(others))
    if words[:1] == ["cuts"]:  # whose --out is a figure, and not the run folder of a file
        files.append("--out=null")
    return [*others[:options], *files, *others[options:]]


def _with_run_settings(words: list[str]) -> list[str]:
    """`retrain RUN …` starts from that run's settings, but for its folder, and is one process."""
    if words[:1] != ["retrain"] or len(words) < 2 or {"-h", "--help"} & set(words):
        return words
    if words[1].startswith("-"):
        raise InputError("retrain", "the folder of a run first, then the options", words[1], "write it first")
    settings = _path("RUN", words[1]) / "config.yaml"
    if not settings.is_file():
        raise InputError("retrain", "the folder of a run", f"no config.yaml in {words[1]}", "check the path")
    return [*words[:2], f"--config={settings}", "--out", "null", "--server.shard", "false", *words[2:]]


def _spelled_out(word: str) -> str:
    """`--task multilabel` is `--task.name multilabel`, `--track wandb` is `--track.to wandb`."""
    return re.sub(r"^--track(?==|$)", "--track.to", re.sub(r"^--task(?==|$)", "--task.name", word))


def _option_names(parser: ArgumentParser) -> list[str]:
    return [name for action in parser._actions for name in action.option_strings]
