"""Trackers by their own libraries: TensorBoard, MLflow, Weights & Biases, Trackio.

None of them needs a network, and what they write is below the run folder, or the one that several runs share, unless
the library's own environment variables say another place. `view` says how to look at it.
"""

import contextlib
import io
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from halfpass.run import logs
from halfpass.run.tracking import Place, measures, outcome

PROJECT = "halfpass"  # where the library's own variables do not name another


class Made(Protocol):
    def start(self, config: Mapping[str, Any]) -> None: ...
    def log(self, row: Mapping[str, Any]) -> None: ...
    def finish(self, result: Mapping[str, Any] | None) -> None: ...


def _say(name: str, how: str) -> None:
    logs.say(f"tracked by {name}: {how}", event="tracker")


class TensorBoard:
    """Files in `RUN/tensorboard`."""

    def __init__(self, place: Place) -> None:
        self._place, self._folder = place, place.run / "tensorboard"

    def start(self, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        # What an earlier process wrote of epochs that come again counts no more.
        again = self._place.epoch + 1 if self._place.known else None
        self._writer = SummaryWriter(str(self._folder), purge_step=again)
        if not self._place.known:
            self._writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in config.items()))
            known = {k: v for k, v in config.items() if isinstance(v, bool | int | float | str)}
            for summary in hparams(known, {"result/test_accuracy": 0.0}):
                self._writer.file_writer.add_summary(summary)
        self._writer.flush()
        self._place.known = self._place.name
        _say("tensorboard", f"tensorboard --logdir {self._place.folder}")

    def log(self, row: Mapping[str, Any]) -> None:
        for name, value in measures(row).items():
            self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def finish(self, result: Mapping[str, Any] | None) -> None:
        for name, value in outcome(result or {}).items():
            self._writer.add_scalar(f"result/{name}", value, self._place.epoch)
        self._writer.close()


class MLflow:
    """`mlflow.db`, a file of SQLite, unless MLFLOW_TRACKING_URI says another place. The runs of a group are an
    experiment."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def start(self, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_DISABLE_AGENT_HINT", "true")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param
        from mlflow.entities.run_tag import RunTag

        for name in ("mlflow", "alembic"):  # which say how they make their tables
            logging.getLogger(name).setLevel(logging.WARNING)
        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self._place.folder.resolve() / 'mlflow.db'}"
        self._client = MlflowClient(uri)
        if self._place.known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self._place.group or PROJECT
            run = self._client.create_run(_experiment(self._client, name, self._place), run_name=self._place.name)
            self._place.known = str(run.info.run_id)
            params = [Param(name, str(value)[:6000]) for name, value in config.items()]
            tags = [] if self._place.group is None else [RunTag("group", self._place.group)]
            self._client.log_batch(self._place.known, params=params[:100], tags=tags)
            self._client.log_batch(self._place.known, params=params[100:])
        self._client.set_terminated(self._place.known, "RUNNING")
        _say("mlflow", f"mlflow ui --backend-store-uri {uri}")

    def log(self, row: Mapping[str, Any]) -> None:
        self._log(measures(row), row["epoch"])

    def finish(self, result: Mapping[str, Any] | None) -> None:
        self._log({f"result/{name}": value for name, value in outcome(result or {}).items()}, self._place.epoch)
        self._client.set_terminated(self._place.known, "KILLED" if result is None else "FINISHED")

    def _log(self, values: Mapping[str, float], epoch: int) -> None:
        now = round(time.time() * 1000)
        self._client.log_batch(self._place.known, [self._metric(k, v, now, epoch) for k, v in values.items()])


def _experiment(client: Any, name: str, place: Place) -> str:
    """Its number; made where there is none. Two runs of a group may want that at the same time."""
    for _ in range(2):
        if (found := client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        try:
            where = None if os.environ.get("MLFLOW_TRACKING_URI") else (place.folder.resolve() / "mlruns").as_uri()
            return str(client.create_experiment(name, artifact_location=where))
        except Exception:
            time.sleep(0.5)
    return str(client.get_experiment_by_name(name).experiment_id)


class WandB:
    """Offline, in the folder `wandb`, unless WANDB_MODE and WANDB_DIR say otherwise; `wandb sync` uploads it."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def start(self, config: Mapping[str, Any]) -> None:
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
            os.environ.setdefault("WANDB_CACHE_DIR", str(self._place.folder.resolve() / "wandb" / "cache"))
        import wandb

        known = self._place.known or secrets.token_hex(4)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=self._place.name, group=self._place.group,
            dir=os.environ.get("WANDB_DIR") or str(self._place.folder), mode=mode, id=known, config=dict(config),
            resume="allow" if self._place.known and mode == "online" else None, allow_val_change=True,
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip
        self._place.known = known
        self._run.define_metric("*", step_metric="epoch")
        how = f"wandb sync {self._run.settings.sync_dir}" if mode == "offline" else self._run.url
        _say("wandb", str(how))

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(measures(row) | {"epoch": row["epoch"]}, step=row["epoch"])

    def finish(self, result: Mapping[str, Any] | None) -> None:
        for name, value in outcome(result or {}).items():
            self._run.summary[f"result/{name}"] = value
        self._run.finish(exit_code=0 if result is not None else 1)


class Trackio:
    """A file of SQLite in the folder `trackio`, unless TRACKIO_DIR says another place."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def start(self, config: Mapping[str, Any]) -> None:
        folder = os.environ.setdefault("TRACKIO_DIR", str(self._place.folder.resolve() / "trackio"))
        import trackio

        again, self._place.known = self._place.known, self._place.known or self._place.name
        with contextlib.redirect_stdout(io.StringIO()):  # which is the command's own
            self._run = trackio.init(
                PROJECT, name=self._place.known, group=self._place.group, config=dict(config), embed=False,
                resume="allow" if again else "never", auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        _say("trackio", f"TRACKIO_DIR={folder} trackio show --project {PROJECT}")

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(measures(row), step=row["epoch"])

    def finish(self, result: Mapping[str, Any] | None) -> None:
        if result is not None:
            self._run.log({f"result/{name}": value for name, value in outcome(result).items()}, step=self._place.epoch)
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


TRACKERS: dict[str, Callable[[Place], Made]] = {
    "tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB, "trackio": Trackio,
}  # fmt: skip
