"""Settings: one frozen dataclass per group, a sentence under each field, checked when made.

The command line, its help and the YAML files are made from these classes (`halfpass/commands/cli.py`). Settings stop at
the door: only `halfpass.run`, `commands` and `report` know them, all else takes plain values.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from halfpass.errors import InputError, choice_error, near_miss
from halfpass.files import at_home

Method = Literal["decoupled", "conventional", "centralized"]
Runtime = Literal["local", "processes"]
Topology = Literal["relay", "splitfed", "independent"]
Partition = Literal["iid", "dirichlet", "own"]
Optimizer = Literal["sgd", "adamw"]
Schedule = Literal["constant", "cosine", "one-cycle"]
Precision = Literal["fp32", "bf16"]
Order = Literal["round-robin", "arrival"]
Loading = Literal["auto", "memory", "stream"]
Normalization = Literal["agreed", "own"]
TargetKind = Literal["auto", "classes", "numbers"]
Level = Literal["debug", "info", "warning"]


MOST_WINDOW = 2**31 - 1 - 2**20  # bytes: a message of gRPC takes no more, and has something beside a batch in it
CLIENT = "{client}"  # in a path, stands for the client's number
MOST_THREADS = 1024  # far beyond any gain; PyTorch does not survive every number
_WHOLE = 2**63  # what the libraries below count in


def _settle(settings: Any, group: str, **least: float) -> None:
    """Makes every setting a plain value of its field's type, and refuses what is none, not among the choices, or
    smaller than its least value. So settings that are given in Python are what those of the command line are: numbers
    of NumPy and PyTorch, paths and subclasses of text are taken, and what cannot be written down is not."""
    for name, hint in get_type_hints(type(settings)).items():
        value = _typed(group + name, hint, getattr(settings, name))
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise choice_error(group + name, get_args(hint), value)
        if value is not None and name in least and value < least[name]:
            raise InputError(group + name, f"a number of at least {least[name]:.12g}", repr(value), "change it")
        object.__setattr__(settings, name, value)  # they are frozen, which is for all others


def _at_most(settings: Any, group: str, **most: float) -> None:
    for name, maximum in most.items():
        value = getattr(settings, name)
        if value is not None and value > maximum:
            raise InputError(group + name, f"a number of at most {maximum:.12g}", repr(value), "change it")


def _at_home(settings: Any, group: str, *names: str) -> None:
    """Folders and files of these settings may begin with ~."""
    for name in names:
        if (path := getattr(settings, name)) is not None:
            object.__setattr__(settings, name, at_home(group + name, path))


_KINDS: dict[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list[float]: "a list of numbers",
}  # fmt: skip


def _typed(key: str, hint: Any, value: Any) -> Any:
    """`value` as the field's type hint wants it. A number may be text, such as 1e-3, which YAML takes for that."""
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, cast(type, hint)):
            raise InputError(key, f"a {cast(type, hint).__name__}", _shown(value), "correct it")
        return value
    kinds = [str] if get_origin(hint) is Literal else list(get_args(hint) or (hint,))
    if list[float] in kinds and isinstance(value, list | tuple):
        return [_typed(key, float, part) for part in value]
    value = plain = _plain(value)
    if float in kinds and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            plain = float(value)
    if type(plain) not in kinds:
        expected = " or ".join(_KINDS.get(kind, "null") for kind in kinds)
        raise InputError(key, expected, _shown(value), "correct it")
    if isinstance(plain, float) and not math.isfinite(plain):
        raise InputError(key, "a finite number", _shown(value), "correct it")
    if isinstance(plain, int) and not -_WHOLE <= plain < _WHOLE:
        raise InputError(key, "a whole number of 64 bits", _shown(value), "correct it")
    if isinstance(plain, str) and "\0" in plain:
        raise InputError(key, "text without null bytes", _shown(value), "correct it")
    return plain


def _plain(value: Any) -> Any:
    """A scalar of NumPy or PyTorch, a path, or a subclass of text or a number as Python's own."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    elif getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        with contextlib.suppress(RuntimeError):  # a tensor without data
            value = value.item()
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return int.__int__(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:80]}…"


@dataclass(frozen=True)
class DataConfig:
    """The data set."""

    name: str = "digits"
    """digits, cifar10, cifar100, imagefolder, imagetable (a CSV of picture files and target columns), csv (a table),
    listops (generated texts), or module:function returning a (train, test) pair of torch datasets."""
    path: str | None = None
    """Folder (or official archive, or table) that holds the data set; digits and listops have none. A module:function
    gets it as path=. With clients.partition own, {client} in it is each client's number, as in DIR/site-{client}."""
    limit: int | None = None
    """Use at most this many training samples, and as many test samples."""
    download: bool = False
    """Fetch the official CIFAR archive into the path when it is not there, and check its sum."""
    image_size: int = 32
    """Height and width in pixels that imagefolder pictures are resized and cropped to."""
    crop_padding: int = 2
    """Pixels of mirrored margin around a CIFAR training picture, out of which it is cropped at random in every epoch;
    it is flipped at random too. Longer training gains from a wider one."""
    validation: int | None = None
    """Hold out so many training samples, always the same ones, and test on them: settings are to be chosen by these and
    not by the test set, which is left alone then."""
    target: str | None = None
    """Target column of csv and imagetable, or several separated by commas: one of text is a class, several are labels
    or numbers."""
    target_kind: TargetKind = "auto"
    """What one target column holds. auto: classes where it is text, or numbers that are 0, 1, 2 and so on."""
    ignore: str | None = None
    """Columns of csv that are no inputs, such as identifiers, separated by commas."""
    categorical: str | None = None
    """Columns of csv that hold categories although they look like numbers, separated by commas; COLUMN=A|B|C names a
    column's categories too, so that sites that lack some have the same."""
    picture: str | None = None
    """Column of imagetable with the paths of the pictures. Default: its first."""
    separator: str = ","
    """What separates the columns of csv and imagetable."""
    test_share: float | None = None
    """Share of the rows of csv and imagetable that is tested on, always the same ones, where data.path is one file."""
    classes: str | None = None
    """Names of the classes in their order, separated by commas, or their number: for sites that lack some of them.
    Default: what the data set says or holds."""
    gray_range: str | None = None
    """LOW,HIGH: the values of 16-bit pictures that become black and white. Default: the lowest and highest."""
    normalization: Normalization = "agreed"
    """agreed: clients that normalize their own inputs by other numbers are refused. own: each by its own training
    samples' mean and deviation, which is then meant."""
    loading: Loading = "auto"
    """memory: all samples are read once. stream: those of a batch when it is due, and anew in every epoch. auto: stream
    where training samples are drawn at random, as augmenting sets do, or do not fit into memory."""
    workers: int = 0
    """Processes of each client that draw the samples of a stream ahead. Default: none; the training process does."""

    def __post_init__(self) -> None:
        _settle(self, "data.", limit=1, image_size=1, crop_padding=0, validation=1, workers=0)
        _at_most(self, "data.", image_size=2**14, crop_padding=2**14)
        _at_home(self, "data.", "path")
        if self.test_share is not None and not 0 < self.test_share < 1:
            raise InputError("data.test_share", "more than 0 and less than 1", f"{self.test_share}", "0.2 is usual")
        if self.classes is not None and self.classes.isdigit() and int(self.classes) < 1:
            raise InputError("data.classes", "at least 1 class", self.classes, "leave it out")


@dataclass(frozen=True)
class TaskConfig:
    """What is learned: the targets, the loss, the metrics."""

    name: str = "classification"
    """classification (a class per sample), multilabel (0, 1 or unknown for each of several labels), regression
    (numbers), segmentation (a class per pixel), tokens (a class per token), or module:function returning a Task, or
    (loss, metrics)."""
    loss: str | None = None
    """Of regression: mse, mae or huber. Default: mse."""
    class_weights: list[float] | None = None
    """Weight of each class, label or target column in the loss. Default: all alike."""
    positive_weights: list[float] | None = None
    """Of multilabel: weight of what is there, for each label, where it is rare."""
    ignore_index: int | None = None
    """The class number that says that a sample, pixel or token is not labelled: it has no part in loss and metrics.
    Default: 255 in segmentation, -100 in tokens, none in classification."""
    metric: str | None = None
    """The metric that tables, curves and reports lead with. Default: accuracy, auroc_macro, r2, mean_iou, accuracy."""

    def __post_init__(self) -> None:
        _settle(self, "task.")
        for name in ("class_weights", "positive_weights"):
            weights = getattr(self, name)
            if weights is not None and not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
                raise InputError(f"task.{name}", "numbers of at least 0, not all 0", f"{weights}", "change them")


@dataclass(frozen=True)
class ModelConfig:
    """The network, where it is cut, and the auxiliary head at the cut."""

    name: str = "digits-cnn"
    """resnet20, resnet32, resnet44, resnet56, resnet110 (of small pictures), resnet50 (of 224 pixels), digits-cnn, unet
    (a class per pixel), transformer (of texts); timm:NAME, torchvision:NAME or hf:FOLDER, of those libraries where they
    are installed; or module:function returning an nn.Module, or a pair of them: client half and server half."""
    cut: str | None = None
    """Layer after which the network is cut, e.g. stage_2.2; `halfpass cuts` lists them. A network that halfpass ships
    has a cut near its middle as default; a given pair of halves has none."""
    head: str = "linear"
    """Auxiliary head of decoupled training: linear, pooled-linear, mlp, conv, conv-2, tail, tail-2, tail-3, or
    module:function; none where all below the cut is frozen."""
    weights: str | None = None
    """File of initial weights by name (safetensors, or PyTorch's of tensors alone). Each side loads what is its own;
    what does not match is said."""
    pretrained: bool = False
    """Take the published weights of a network of timm, torchvision or hf."""
    freeze: str | None = None
    """Parameters that are not trained, as patterns separated by commas: stem.*, stage_1.*"""
    may_cross: str | None = None
    """Names of inputs, separated by commas, that the server may see as they are, such as adjacency or
    decoder_input_ids. Default: none, except masks; a cut that needs another is refused."""
    edge_cut: str | None = None
    """A second, later cut of decoupled training: what is between the two runs on an edge server, which learns from an
    auxiliary head of its own and uploads in its turn. Default: none; client and server."""

    def __post_init__(self) -> None:
        _settle(self, "model.")


@dataclass(frozen=True)
class ClientsConfig:
    """The data owners."""

    count: int = 1
    """Number of clients."""
    topology: Topology = "splitfed"
    """relay: the client half visits the clients in turn. splitfed: clients in parallel, client halves averaged every
    round. independent: every client keeps its own half."""
    partition: Partition = "iid"
    """How the training set is dealt out: iid, dirichlet (label skew), or own: every client trains on the whole data
    set that it was given, and tests on its own test set, for a score of each and of all together. Else one client
    brings the test set; independent ones each."""
    alpha: float = 0.5
    """Concentration of the Dirichlet partition; small is skewed."""
    rounds: int = 1
    """Rounds of a splitfed epoch: client halves are averaged after each. More of them bring several clients closer to
    what one would learn, for the bytes of a client half and head, up and down, each time. A client with
    fewer batches than there are rounds takes no part in some."""
    quorum: int | None = None
    """Between processes: how many clients are enough. One that is away for wire.timeout seconds, or misbehaves, is then
    given up, and the run goes on with the others, or begins with them; it may come, or come back, with its next turn.
    Default: all are needed, and waited for."""
    sample: int | None = None
    """How many clients take part in an epoch of a splitfed run, drawn anew for each by train.seed; the others rest.
    Default: all take part."""
    lr_scale: float = 1.0
    """A client's learning rate is train.lr times this. N clients that are averaged every few batches learn like one
    with batches N times as large, which takes a larger rate: N times (arXiv 1706.02677), or less if they are many."""

    def __post_init__(self) -> None:
        _settle(self, "clients.", count=1, rounds=1, alpha=1e-6, lr_scale=0, quorum=1, sample=1)
        if self.quorum is not None and self.quorum > self.count:
            expected = f"at most clients.count {self.count}"
            raise InputError("clients.quorum", expected, str(self.quorum), "lower it")
        if self.sample is not None:
            self._check_sample(self.sample)
        _at_most(self, "clients.", count=2**16, alpha=1e9)
        if self.alpha != 0.5 and self.partition != "dirichlet":
            remedy = "leave it out, or set clients.partition to dirichlet"
            raise InputError("clients.alpha", f"its default in partition {self.partition}", str(self.alpha), remedy)
        if self.rounds > 1 and self.topology != "splitfed":
            raise InputError("clients.rounds", f"1 in topology {self.topology}", str(self.rounds), "leave it out")

    def _check_sample(self, sample: int) -> None:
        if sample > self.count:
            raise InputError("clients.sample", f"at most clients.count {self.count}", str(sample), "lower it")
        remedy = "leave it out, or clients.sample"
        if self.topology != "splitfed":
            raise InputError("clients.topology", "splitfed, with clients.sample", self.topology, remedy)
        if self.rounds > 1:
            raise InputError("clients.rounds", "1, with clients.sample", str(self.rounds), remedy)
        if self.partition == "own":
            expected = "iid or dirichlet, with clients.sample: each site tests on its own data behind every epoch"
            raise InputError("clients.partition", expected, self.partition, remedy)
        if self.quorum is not None:
            raise InputError("clients.quorum", "none, with clients.sample", str(self.quorum), remedy)


@dataclass(frozen=True)
class TrainConfig:
    """The training recipe."""

    epochs: int = 10
    """Passes over the training set."""
    test_every: int = 1
    """Epochs from one test to the next; the last epoch is always tested. A test sends the whole test set's activations
    up: with CIFAR-10 a fifth of what an epoch of training sends."""
    batch_size: int = 128
    """Samples per batch of one client."""
    optimizer: Optimizer = "sgd"
    """sgd (with momentum) or adamw, for either half."""
    lr: float = 0.2
    """Learning rate; the peak where the schedule varies it."""
    schedule: Schedule = "one-cycle"
    """Learning rate over the run, changed every step."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Nesterov momentum of sgd."""
    weight_decay: float = 5e-4
    """Weight decay, of all parameters."""
    micro_batch: int | None = None
    """Samples that a decoupled run computes and sends at a time, to save memory on both sides. A step still learns from
    the whole batch, but BatchNorm normalizes by each micro-batch's own statistics. Default: the whole batch."""
    feedback_every: int | None = None
    """The server of a decoupled run returns the gradient of every k-th batch of a client, whose half learns from that
    instead of the auxiliary head: 1 learns, and waits, as conventional does. Default: never."""
    label_smoothing: float = 0.0
    """Share of a label that is spread evenly over all classes, in every loss that is trained by. Not of regression."""
    seed: int = 0
    """Fixes initial weights, partition, batch order, augmentation and dropout."""
    precision: Precision = "fp32"
    """fp32, or bf16 autocast."""
    device: str = "cpu"
    """Device of this process, e.g. cpu or cuda:0."""
    threads: int | None = None
    """CPU threads per process. Default: OMP_NUM_THREADS where that is set, else all cores, shared evenly between the
    processes that one command starts."""
    compile: bool = False
    """Takes less time for a step. On a GPU of NVIDIA, steps are recorded as CUDA graphs and replayed, which took a
    ResNet-110 of batches of 128 in bf16 from 49 to 14 ms on an H100; a network that looks at its values on the way
    cannot be recorded, and what Python draws or decides in a forward pass stays as it was. On a CPU, torch.compile
    makes kernels of BatchNorm, addition and ReLU in one, which takes nearly a fifth off a step of ResNet-20 in bf16,
    and needs a C++ compiler; two halves that were given as such stay as they are. The first batches take up to a minute
    longer there; results differ in the last digits."""

    def tests(self, epoch: int) -> bool:
        """Whether there is a test after that epoch, counted from 0."""
        return (epoch + 1) % self.test_every == 0 or epoch + 1 == self.epochs

    @property
    def at_once(self) -> int:
        """Samples that are computed and sent at a time."""
        return self.batch_size if self.micro_batch is None else min(self.micro_batch, self.batch_size)

    def __post_init__(self) -> None:
        # Micro-batches of 2 would leave a single sample of an odd batch, and that BatchNorm cannot normalize.
        _settle(self, "train.", epochs=1, batch_size=1, lr=0, momentum=0, weight_decay=0, seed=0, threads=1,
                feedback_every=1, micro_batch=3, test_every=1)  # fmt: skip
        _at_most(self, "train.", epochs=2**31 - 1)  # messages number them in 32 bits
        if self.threads is not None and self.threads > MOST_THREADS:
            raise InputError("train.threads", f"at most {MOST_THREADS}", str(self.threads), "one per core is usual")
        if not 0 <= self.label_smoothing < 1:
            found = f"{self.label_smoothing}"
            raise InputError("train.label_smoothing", "at least 0 and less than 1", found, "0.1 is usual")
        for name, usual in (("momentum", 0.9), ("nesterov", True)):
            if self.optimizer != "sgd" and (value := getattr(self, name)) != usual:
                expected = f"its default with train.optimizer {self.optimizer}"
                remedy = "leave it out, or set train.optimizer to sgd"
                raise InputError(f"train.{name}", expected, str(value), remedy)
        if self.nesterov and self.optimizer == "sgd" and self.momentum == 0:
            raise InputError("train.nesterov", "a momentum above 0", "train.momentum 0", "set train.nesterov to false")


@dataclass(frozen=True)
class WireConfig:
    """What happens between the halves."""

    codec: str = "none"
    """How activations are encoded: none (exact), fp16, bf16, int8, int4 or int2, each also with +zstd, as in int2+zstd,
    which compresses the bytes. Conventional gradients come down the same way."""
    every: int = 1
    """A decoupled client uploads every k-th of its batches, and learns from all of them."""
    budget: int | None = None
    """Bytes of training batches that each decoupled client may upload in the whole run, spread evenly over it: a batch
    that would be ahead of its share is not uploaded. Default: no limit."""
    order: Order = "round-robin"
    """Order in which the server takes the batches of parallel clients: round-robin by (step, client), which repeats
    exactly, or arrival, which waits for nobody. In one process it is always round-robin."""
    window: int = 32 * 2**20
    """Bytes that a client may have sent and not yet had acknowledged: how far it runs ahead of the server."""
    timeout: float = 60.0
    """Seconds without a sign of life after which a connection counts as lost; the same on both sides."""
    reconnect: float = 600.0
    """Seconds for which a lost server or client is waited for; a decoupled client trains on meanwhile. 0: the run ends
    with the first lost connection."""

    def __post_init__(self) -> None:
        _settle(self, "wire.", window=1, timeout=0.1, every=1, budget=1, reconnect=0)
        _at_most(self, "wire.", window=MOST_WINDOW, timeout=1e6, reconnect=1e9)


@dataclass(frozen=True)
class CheckpointConfig:
    """What a process between processes keeps, so that nothing is lost with it. Each has its own."""

    every: int | None = 100
    """Steps from one checkpoint to the next, beside those at epochs' ends; null for these alone. 0: nothing is kept,
    and a lost process or connection ends the run."""
    spool: int = 4 * 2**30
    """Bytes of disk for what the other side may need again, of each client: how far a decoupled client can train on
    while its server is away."""

    def __post_init__(self) -> None:
        _settle(self, "checkpoint.", every=0, spool=2**20)


@dataclass(frozen=True)
class TlsConfig:
    """Encrypted connections, and who may join. Each process has its own; secrets are in files, never in settings."""

    folder: str | None = None
    """Folder of what `halfpass certs` made: authority.pem, and this process's own files, which are server.pem and
    tokens, edge.pem, or client-N.pem or client-N.token, each certificate with its key. The other settings of this group
    take precedence."""
    certificate: str | None = None
    """This process's certificate, in PEM, those of authorities between behind it."""
    key: str | None = None
    """Its key, in PEM, without a password."""
    authority: str | None = None
    """Certificates of the authorities that are trusted: by a client for servers, by a server for clients."""
    tokens: str | None = None
    """A server's file of clients' tokens: a client's number and the SHA-256 of its token in each line."""
    token: str | None = None
    """A client's file that holds its token. Default: the environment variable HALFPASS_TOKEN, where it is set."""
    server_name: str | None = None
    """The name in the server's certificate, where a client reaches it under another."""

    def __post_init__(self) -> None:
        _settle(self, "tls.")
        _at_home(self, "tls.", "folder", "certificate", "key", "authority", "tokens", "token")


@dataclass(frozen=True)
class LogConfig:
    """What a server or a client that was started by hand says of its run, on standard error. Each has its own."""

    json: bool = False
    """Every line is a JSON object: time (UTC), level, event, text, and what is known of the event. No bar then."""
    level: Level = "info"
    """debug, info or warning: what is less is left out."""

    def __post_init__(self) -> None:
        _settle(self, "log.")


@dataclass(frozen=True)
class MetricsConfig:
    """Figures for Prometheus, of a server, or of a client that was started by hand. Each has its own."""

    port: int | None = None
    """The port of http://HOST:PORT/metrics; 0 takes a free one. Default: none."""
    host: str = "127.0.0.1"
    """Where it listens. Whoever reaches it can read the figures: nobody is asked who he is."""

    def __post_init__(self) -> None:
        _settle(self, "metrics.", port=0)
        _at_most(self, "metrics.", port=65535)


@dataclass(frozen=True)
class TrackConfig:
    """Trackers that show the run beside others. docs/how-to/watch.md goes through them."""

    to: str | None = None
    """tensorboard, mlflow, wandb, trackio, or module:function of one's own; several separated by commas. `--track` is
    the same."""
    folder: str | None = None
    """Where they write. Runs that have it alike are one group, which is called as the folder. Default: the run folder;
    in a comparison or a grid the folder of all its runs."""

    def __post_init__(self) -> None:
        _settle(self, "track.")
        _at_home(self, "track.", "folder")


@dataclass(frozen=True)
class ServerConfig:
    """What the server does with the uploads. Its clients need not know."""

    replay: int = 1
    """How many times a decoupled server trains on each upload in all: once as it comes, the others from the store while
    the next epoch's uploads come, and in epochs of its own after the last."""
    store: str | None = None
    """Folder that keeps uploads on disk, for replay and `halfpass retrain`. Default: store/ in the run folder where
    server.replay needs one; otherwise no upload is kept."""
    store_limit: int = 4 * 2**30
    """Bytes of disk that the store may take; the oldest uploads make room for new ones, and training's for
    those of the last test. Where the test's do not fit, none is kept, and `halfpass retrain` cannot test."""
    merge: int = 1
    """How many uploads a decoupled server learns from in one step, their samples as one batch. Where clients upload in
    turn, that is a batch of several of them, and its labels are less skewed than each one's (arXiv 2405.04875). The
    server keeps them in memory until they are together."""
    shard: bool = False
    """Of the processes that torchrun starts for one server, each keeps a part of the server half's weights, gradients
    and optimizer's memory, for halves whose training does not fit on one device; when it is built, and for a step
    layer by layer, a half must. Default: each has all of it."""

    def __post_init__(self) -> None:
        _settle(self, "server.", replay=1, store_limit=2**24, merge=1)
        _at_home(self, "server.", "store")


@dataclass(frozen=True)
class Config:
    """One training."""

    method: Method = "decoupled"
    """decoupled: the client learns from the auxiliary head, and nothing comes back. conventional: the server returns
    the gradient of every batch. centralized: one process, no cut."""
    runtime: Runtime = "local"
    """local: everything in this process. processes: a server process and one process per client, over gRPC."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data set."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """What is learned."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network, cut and head."""
    clients: ClientsConfig = field(default_factory=ClientsConfig)
    """Data owners."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Training recipe."""
    wire: WireConfig = field(default_factory=WireConfig)
    """Wire between the halves."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """Server's use of the uploads."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What is kept, to go on from."""
    tls: TlsConfig = field(default_factory=TlsConfig)
    """Encryption, and who may join."""
    log: LogConfig = field(default_factory=LogConfig)
    """What is said of the run."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Figures for Prometheus."""
    track: TrackConfig = field(default_factory=TrackConfig)
    """Trackers that follow the run."""
    out: str | None = None
    """Run folder to write; it must not hold a run yet. Default: a new folder under runs/."""

    def __post_init__(self) -> None:
        _settle(self, "")
        _at_home(self, "", "out")
        if CLIENT in (self.data.path or "") and (self.clients.partition != "own" or self.method == "centralized"):
            expected = f"no {CLIENT} where all data are one: it needs clients.partition own and a split method"
            raise InputError("data.path", expected, str(self.data.path), "change one of them")
        if self.model.edge_cut is not None and self.train.feedback_every is not None:
            raise InputError("model.edge_cut", "no gradient back", "train.feedback_every", "leave one of them out")
        if self.clients.quorum is not None and self.model.edge_cut is not None:
            why = "with clients.quorum and model.edge_cut, whose server above waits for all micro-batches of a batch"
            _refuse_others({"train.micro_batch": self.train.micro_batch}, why, "leave clients.quorum out")
        if self.clients.sample is not None:
            others = {"model.edge_cut": self.model.edge_cut, "server.replay": self.server.replay}
            _refuse_others(others, "with clients.sample", "leave clients.sample out")
        for name, value in (("model.edge_cut", self.model.edge_cut), ("train.micro_batch", self.train.micro_batch)):
            if value is not None:  # a batch goes on from the edge, or is learned from, in the parts in which it comes
                _refuse_others({"server.merge": self.server.merge}, f"with {name}", f"leave {name} out")
        if self.model.edge_cut is not None and self.server.store is not None:
            expected = "its default with model.edge_cut: each server keeps its uploads in its own run folder"
            raise InputError("server.store", expected, self.server.store, "leave it out")
        if self.method != "decoupled":
            settings = flatten(as_dict(self))
            conventional = self.method == "conventional"
            why = "whose every step needs its own gradient back" if conventional else "which has one part"
            reason = f"with method {self.method}, {why}"
            _refuse_others({name: settings[name] for name in DECOUPLED}, reason, "train decoupled")
        elif self.train.feedback_every is not None:
            _refuse_others(
                {"train.micro_batch": self.train.micro_batch, "wire.budget": self.wire.budget,
                 "server.merge": self.server.merge},
                "with train.feedback_every, for whose gradients whole batches must go up",
                "leave train.feedback_every out",
            )
            if self.train.feedback_every % self.wire.every:
                expected = f"a multiple of wire.every {self.wire.every}, for what is not uploaded has no gradient"
                raise InputError("train.feedback_every", expected, str(self.train.feedback_every), "change one of them")

    @property
    def folder(self) -> Path:
        """The run folder, where one was chosen or made up (`with_folder`)."""
        assert self.out is not None
        return Path(self.out)

    def returns_gradient(self, step: int) -> bool:
        """Whether the server returns the gradient of a client's batch; `step` counts within the epoch."""
        every = self.train.feedback_every
        return self.method == "conventional" or (every is not None and step % every == 0)


DECOUPLED = (  # what the other methods cannot have
    "model.edge_cut", "train.micro_batch", "train.feedback_every", "wire.every", "wire.budget", "server.replay",
    "server.merge",
)  # fmt: skip


SPLIT = {  # what results and their tables call a split training's settings → the settings, in a table's order
    "runtime": "runtime", "cut": "model.cut", "edge_cut": "model.edge_cut", "head": "model.head",
    "topology": "clients.topology", "clients": "clients.count", "rounds": "clients.rounds",
    "lr_scale": "clients.lr_scale", "codec": "wire.codec", "every": "wire.every", "replay": "server.replay",
    "merge": "server.merge", "budget": "wire.budget", "micro_batch": "train.micro_batch",
    "feedback_every": "train.feedback_every",
}  # fmt: skip
RECORDED = {  # and any training's
    "method": "method", "dataset": "data.name", "validation": "data.validation", "task": "task.name",
    "model": "model.name", "epochs": "train.epochs", "seed": "train.seed", "precision": "train.precision",
    "device": "train.device", "compile": "train.compile", **SPLIT,
}  # fmt: skip


def without_decoupled(config: Config, method: str) -> Config:
    """The same settings for another method, without what only decoupled training can have."""
    usual: dict[str, Any] = nested({name: flatten(as_dict(Config()))[name] for name in DECOUPLED})
    kept = {} if method == "decoupled" else usual
    groups = {group: dataclasses.replace(getattr(config, group), **values) for group, values in kept.items()}
    return dataclasses.replace(config, method=cast(Method, method), **groups)


def _refuse_others(values: Mapping[str, int | str | None], reason: str, remedy: str) -> None:
    """Refuses values that are not their defaults."""
    defaults = flatten(as_dict(Config()))
    for name, value in values.items():
        if value != defaults[name]:
            raise InputError(name, f"its default {reason}", str(value), f"leave it out, or {remedy}")


_GROUPS: dict[str, Any] = {
    "data": DataConfig, "task": TaskConfig, "model": ModelConfig, "clients": ClientsConfig, "train": TrainConfig,
    "wire": WireConfig, "server": ServerConfig, "checkpoint": CheckpointConfig, "tls": TlsConfig,
    "log": LogConfig, "metrics": MetricsConfig, "track": TrackConfig,
}  # fmt: skip


def as_dict(config: Config) -> dict[str, Any]:
    """Nested plain values, for YAML and JSON."""
    return dataclasses.asdict(config)


def from_dict(settings: dict[str, Any]) -> Config:
    """The inverse of `as_dict`; raises InputError for an unknown key, a value of another type, or one that a check
    refuses. Numbers may be written in ways that YAML takes for text, such as 1e-3."""
    known, given = flatten(as_dict(Config())), flatten(settings)
    for key in given:
        if key not in known:
            raise InputError("configuration", "a known key", repr(key), near_miss(key, known, "remove it"))
    return Config(**{key: _GROUPS[key](**value) if key in _GROUPS else value for key, value in nested(given).items()})


def refused_groups(settings: Mapping[str, Any]) -> dict[str, InputError]:
    """Why a group of settings, nested as in YAML, is refused by itself; only those that are."""
    refused: dict[str, InputError] = {}
    for name, group in _GROUPS.items():
        try:
            group(**settings.get(name, {}))
        except InputError as error:
            refused[name] = error
    return refused


def setting_types() -> dict[str, Any]:
    """The type hint of each setting, by its dotted name."""
    groups = {"": Config, **_GROUPS}
    hints = {group: get_type_hints(made) for group, made in groups.items()}
    return {f"{group}.{name}".lstrip("."): hint for group, named in hints.items() for name, hint in named.items()}


def number_keys() -> list[str]:
    """The settings that are numbers, by their dotted names."""
    return [name for name, hint in setting_types().items() if {int, float} & {hint, *get_args(hint)}]


def named_code(config: Config) -> dict[str, str]:
    """The settings that name code to import and call, as module:function."""
    texts = {key: value for key, value in flatten(as_dict(config)).items() if isinstance(value, str)}
    library = texts.get("model.name", "").partition(":")[0] in LIBRARIES
    others = {*_NO_CODE, *(key for key in texts if key.startswith("tls.")), *(["model.name"] if library else [])}
    trackers = [name.strip() for name in texts.pop("track.to", "").split(",") if ":" in name]
    own = {"track.to" + (f" ({number})" if number else ""): name for number, name in enumerate(trackers)}
    return {key: value for key, value in texts.items() if ":" in value and key not in others} | own


LIBRARIES = ("timm", "torchvision", "hf")  # what model.name may begin with: networks of these, and no code of a user's
_NO_CODE = {  # whose colons have another meaning
    "data.path", "model.weights", "server.store", "out", "train.device", "metrics.host",
    "track.folder",
}  # fmt: skip


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"lr": 1}}` → `{"train.lr": 1}`, as the command line names them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{"train.lr": 1}` → `{"train": {"lr": 1}}`, the inverse of `flatten`."""
    groups: dict[str, Any] = {}
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        (groups.setdefault(group, {}) if group else groups)[name] = value
    return groups


# What may differ between a server and its clients: each one's own machine and folders, and some whole groups.
_PRIVATE = {
    "runtime", "out", "data.path", "data.download", "data.loading", "data.workers", "model.weights", "train.device",
    "train.threads", "train.compile", "wire.reconnect",
}  # fmt: skip
_OWN = {"data.name", "data.limit", "data.picture", "data.separator", "data.test_share"}  # of clients with own data


def shared_settings(config: Config) -> dict[str, Any]:
    """The settings, by dotted name, in which a server and its clients must agree.

    Clients that bring their own data (`clients.partition own`) need not agree on how it is called and read.
    """
    private = _PRIVATE | (_OWN if config.clients.partition == "own" else set())
    settings = flatten(as_dict(config))
    own = ("server.", "checkpoint.", "tls.", "log.", "metrics.", "track.")
    return {key: value for key, value in settings.items() if key not in private and not key.startswith(own)}
