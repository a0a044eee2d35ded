from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tensor(_message.Message):
    __slots__ = ("name", "dtype", "shape", "channels_last", "codec", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_LAST_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    channels_last: bool
    codec: str
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., channels_last: bool = ..., codec: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("protocol", "client", "settings", "inputs", "outputs", "samples", "steps", "parameters", "fingerprint", "targets", "plan", "run", "received", "first", "process")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client: int
    settings: str
    inputs: str
    outputs: int
    samples: int
    steps: int
    parameters: int
    fingerprint: str
    targets: str
    plan: str
    run: str
    received: int
    first: int
    process: int
    def __init__(self, protocol: _Optional[int] = ..., client: _Optional[int] = ..., settings: _Optional[str] = ..., inputs: _Optional[str] = ..., outputs: _Optional[int] = ..., samples: _Optional[int] = ..., steps: _Optional[int] = ..., parameters: _Optional[int] = ..., fingerprint: _Optional[str] = ..., targets: _Optional[str] = ..., plan: _Optional[str] = ..., run: _Optional[str] = ..., received: _Optional[int] = ..., first: _Optional[int] = ..., process: _Optional[int] = ...) -> None: ...

class Batch(_message.Message):
    __slots__ = ("test", "client", "epoch", "step", "tensors", "labels", "before", "after", "answers", "targets", "whole")
    TEST_FIELD_NUMBER: _ClassVar[int]
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    test: bool
    client: int
    epoch: int
    step: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    labels: _containers.RepeatedScalarFieldContainer[int]
    before: int
    after: int
    answers: Tensor
    targets: _containers.RepeatedCompositeFieldContainer[Tensor]
    whole: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, test: bool = ..., client: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., labels: _Optional[_Iterable[int]] = ..., before: _Optional[int] = ..., after: _Optional[int] = ..., answers: _Optional[_Union[Tensor, _Mapping]] = ..., targets: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., whole: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Upload(_message.Message):
    __slots__ = ("batches",)
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    batches: _containers.RepeatedCompositeFieldContainer[Batch]
    def __init__(self, batches: _Optional[_Iterable[_Union[Batch, _Mapping]]] = ...) -> None: ...

class EpochEnd(_message.Message):
    __slots__ = ("epoch", "loss", "busy_seconds", "samples", "learning_rate", "peak_memory_bytes", "weights", "uploads", "withheld")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    UPLOADS_FIELD_NUMBER: _ClassVar[int]
    WITHHELD_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    loss: float
    busy_seconds: float
    samples: int
    learning_rate: float
    peak_memory_bytes: int
    weights: _containers.RepeatedCompositeFieldContainer[Tensor]
    uploads: int
    withheld: int
    def __init__(self, epoch: _Optional[int] = ..., loss: _Optional[float] = ..., busy_seconds: _Optional[float] = ..., samples: _Optional[int] = ..., learning_rate: _Optional[float] = ..., peak_memory_bytes: _Optional[int] = ..., weights: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., uploads: _Optional[int] = ..., withheld: _Optional[int] = ...) -> None: ...

class TestEnd(_message.Message):
    __slots__ = ("epoch", "samples", "has_head", "scores")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    HAS_HEAD_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    samples: int
    has_head: bool
    scores: _containers.RepeatedCompositeFieldContainer[Score]
    def __init__(self, epoch: _Optional[int] = ..., samples: _Optional[int] = ..., has_head: bool = ..., scores: _Optional[_Iterable[_Union[Score, _Mapping]]] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("metric", "value")
    METRIC_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    metric: str
    value: float
    def __init__(self, metric: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Alive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Failed(_message.Message):
    __slots__ = ("reason", "exit_status")
    REASON_FIELD_NUMBER: _ClassVar[int]
    EXIT_STATUS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    exit_status: int
    def __init__(self, reason: _Optional[str] = ..., exit_status: _Optional[int] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("join", "batch", "epoch_end", "test_end", "finished", "alive", "failed", "place", "durable")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    EPOCH_END_FIELD_NUMBER: _ClassVar[int]
    TEST_END_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    join: Join
    batch: Batch
    epoch_end: EpochEnd
    test_end: TestEnd
    finished: Finished
    alive: Alive
    failed: Failed
    place: int
    durable: int
    def __init__(self, join: _Optional[_Union[Join, _Mapping]] = ..., batch: _Optional[_Union[Batch, _Mapping]] = ..., epoch_end: _Optional[_Union[EpochEnd, _Mapping]] = ..., test_end: _Optional[_Union[TestEnd, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., place: _Optional[int] = ..., durable: _Optional[int] = ...) -> None: ...

class Joined(_message.Message):
    __slots__ = ("run", "received", "anew", "sent")
    RUN_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    ANEW_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    run: str
    received: int
    anew: bool
    sent: int
    def __init__(self, run: _Optional[str] = ..., received: _Optional[int] = ..., anew: bool = ..., sent: _Optional[int] = ...) -> None: ...

class Begin(_message.Message):
    __slots__ = ("epoch", "first_step", "total_steps", "return_weights", "weights", "until", "since")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    RETURN_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    first_step: int
    total_steps: int
    return_weights: bool
    weights: _containers.RepeatedCompositeFieldContainer[Tensor]
    until: int
    since: int
    def __init__(self, epoch: _Optional[int] = ..., first_step: _Optional[int] = ..., total_steps: _Optional[int] = ..., return_weights: bool = ..., weights: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., until: _Optional[int] = ..., since: _Optional[int] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("test",)
    TEST_FIELD_NUMBER: _ClassVar[int]
    test: bool
    def __init__(self, test: bool = ...) -> None: ...

class Gradients(_message.Message):
    __slots__ = ("epoch", "step", "tensors")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Take(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, weights: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Test(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, weights: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Rejected(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("joined", "begin", "ack", "gradients", "test", "finish", "alive", "failed", "rejected", "take", "place", "applied", "durable")
    JOINED_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    TEST_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    TAKE_FIELD_NUMBER: _ClassVar[int]
    PLACE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    joined: Joined
    begin: Begin
    ack: Ack
    gradients: Gradients
    test: Test
    finish: Finish
    alive: Alive
    failed: Failed
    rejected: Rejected
    take: Take
    place: int
    applied: int
    durable: int
    def __init__(self, joined: _Optional[_Union[Joined, _Mapping]] = ..., begin: _Optional[_Union[Begin, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., gradients: _Optional[_Union[Gradients, _Mapping]] = ..., test: _Optional[_Union[Test, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., alive: _Optional[_Union[Alive, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., rejected: _Optional[_Union[Rejected, _Mapping]] = ..., take: _Optional[_Union[Take, _Mapping]] = ..., place: _Optional[int] = ..., applied: _Optional[int] = ..., durable: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("run", "phase", "epoch", "epochs", "step", "steps", "batches_per_second", "checkpoint", "clients_count", "connected", "clients", "waits_for", "waiting_seconds", "busy_seconds", "seconds_left")
    RUN_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    BATCHES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_COUNT_FIELD_NUMBER: _ClassVar[int]
    CONNECTED_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    WAITS_FOR_FIELD_NUMBER: _ClassVar[int]
    WAITING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    run: str
    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    batches_per_second: float
    checkpoint: Checkpoint
    clients_count: int
    connected: int
    clients: _containers.RepeatedCompositeFieldContainer[ClientStatus]
    waits_for: _containers.RepeatedScalarFieldContainer[int]
    waiting_seconds: float
    busy_seconds: float
    seconds_left: float
    def __init__(self, run: _Optional[str] = ..., phase: _Optional[str] = ..., epoch: _Optional[int] = ..., epochs: _Optional[int] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., batches_per_second: _Optional[float] = ..., checkpoint: _Optional[_Union[Checkpoint, _Mapping]] = ..., clients_count: _Optional[int] = ..., connected: _Optional[int] = ..., clients: _Optional[_Iterable[_Union[ClientStatus, _Mapping]]] = ..., waits_for: _Optional[_Iterable[int]] = ..., waiting_seconds: _Optional[float] = ..., busy_seconds: _Optional[float] = ..., seconds_left: _Optional[float] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("epoch", "step", "seconds_ago")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SECONDS_AGO_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    seconds_ago: float
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., seconds_ago: _Optional[float] = ...) -> None: ...

class ClientStatus(_message.Message):
    __slots__ = ("client", "state", "away_seconds", "step", "steps", "received", "applied", "queued", "queued_bytes", "reconnections", "samples", "bytes_up", "bytes_down", "waits")
    CLIENT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    AWAY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_FIELD_NUMBER: _ClassVar[int]
    QUEUED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECONNECTIONS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    client: int
    state: str
    away_seconds: float
    step: int
    steps: int
    received: int
    applied: int
    queued: int
    queued_bytes: int
    reconnections: int
    samples: int
    bytes_up: int
    bytes_down: int
    waits: str
    def __init__(self, client: _Optional[int] = ..., state: _Optional[str] = ..., away_seconds: _Optional[float] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., received: _Optional[int] = ..., applied: _Optional[int] = ..., queued: _Optional[int] = ..., queued_bytes: _Optional[int] = ..., reconnections: _Optional[int] = ..., samples: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., waits: _Optional[str] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("protocol", "run", "cut", "fingerprint", "codec", "tensors", "whole")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    run: str
    cut: str
    fingerprint: str
    codec: str
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    whole: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, protocol: _Optional[int] = ..., run: _Optional[str] = ..., cut: _Optional[str] = ..., fingerprint: _Optional[str] = ..., codec: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., whole: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Answers(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: Tensor
    def __init__(self, outputs: _Optional[_Union[Tensor, _Mapping]] = ...) -> None: ...
