"""A training in MLflow: its settings, its records and how it ended, sent by a thread.

So a server that is slow, silent or gone costs a training a note, and at its end a short wait. Where the server is, and
in which experiment a run begins, MLflow finds in its own environment variables.
"""

import json
import queue
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

from cvae_dist.events import Event, OnEvent
from cvae_dist.model.files import MLFLOW_RUN
from cvae_dist.store import Lease
from cvae_dist.store.lineage import digest_json
from cvae_dist.training.history import GOES_ON, HistoryRecord, StoppedBecause, plotted
from cvae_dist.training.prepare import Training

if TYPE_CHECKING:
    from mlflow import ActiveRun

_PATIENCE = 10.0  # seconds at the end of a training for what was not sent yet
_MOST_SHOWN = 300  # characters of an error
_IN_EVERY_RECORD = "learning_rate"


class Tracking:
    """The run of MLflow that belongs to a training; nothing where no ``training`` asks for it.

    Its id is kept in the model directory whose ``lease`` is held. A training that goes on from a checkpoint goes on
    with its run, and sends the records that are missing there. With other settings, such as more steps, it begins
    another one. As a context it ends the run.
    """

    def __init__(self, training: Training | None, lease: Lease | None, on_event: OnEvent) -> None:
        self._training, self._lease, self._on_event = training, lease, on_event
        self._items: queue.SimpleQueue[HistoryRecord | str] = queue.SimpleQueue()  # records, and then how it ended
        self._thread: threading.Thread | None = None
        self._status = "FAILED"
        self._trouble = ""
        self._is_late = False

    def __enter__(self) -> Self:
        if self._training is None or not self._training.config.mlflow_logging:
            return self
        try:
            import mlflow  # noqa: F401 - slow, and optional; here, as two threads must not import at once

            self._thread = threading.Thread(target=self._send, args=(self._training,), name="mlflow", daemon=True)
            self._thread.start()
        except ImportError:
            self._trouble = "MLflow gets nothing, as it is not installed: pip install 'cvae-dist[mlflow]'"
        return self

    def add(self, *records: HistoryRecord) -> None:
        """Send records, soon; tell, once, where that fails."""
        if self._thread is not None:
            for record in records:
                self._items.put(record)
        self._tell()

    def end(self, stopped: StoppedBecause) -> None:
        """Say how the training has ended. Without a word it has failed."""
        self._status = "KILLED" if stopped in GOES_ON else "FINISHED"

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._items.put(self._status)
            self._thread.join(_PATIENCE)
            self._is_late = self._thread.is_alive()
            if self._is_late:
                self._trouble = f"MLflow has not answered for {_PATIENCE:g} s, and may miss the end of this training"
        self._tell()

    def _tell(self) -> None:
        if self._trouble:
            self._on_event(Event("train", "note", message=self._trouble))
            self._trouble = ""

    def _send(self, training: Training) -> None:
        try:
            self._send_all(training)
        except Exception as error:  # of MLflow, its plugins or the network: none of them ends a training
            said = re.sub(r"//[^/@\s]*@", "//", str(error)).partition("\n")[0][:_MOST_SHOWN]
            self._trouble = f"MLflow gets no more of this training, which goes on: {type(error).__name__}: {said}"

    def _send_all(self, training: Training) -> None:
        import mlflow

        run_id = self._start(training)
        there = mlflow.MlflowClient().get_metric_history(run_id, _IN_EVERY_RECORD)
        last = max((metric.step for metric in there), default=-1)
        while isinstance(item := self._items.get(), Mapping):
            if item["step"] > last:
                mlflow.log_metrics(plotted(item), step=int(item["step"]))
        mlflow.end_run(item)

    def _start(self, training: Training) -> str:
        """Go on with the run of this training, or begin one; return its id."""
        import mlflow

        tags = {"cvae_dist.store": training.data.url}
        if self._lease:
            tags["cvae_dist.model"] = str(self._lease.output)
        run = self._earlier(training) or mlflow.start_run(tags=tags)
        self._keep(training, run.info.run_id)
        if not run.data.params:
            mlflow.log_params(training.config.model_dump(mode="json"))
        return str(run.info.run_id)

    def _earlier(self, training: Training) -> "ActiveRun | None":
        """Go on with the run whose id is kept; return None where there is none."""
        import mlflow

        if self._lease is None:
            return None
        try:
            kept = json.loads((self._lease.output / MLFLOW_RUN).read())
            return mlflow.start_run(kept["run"]) if kept["training"] == digest_json(training.made_with) else None
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return None
        except mlflow.MlflowException:  # it was deleted, or is on another server
            return None

    def _keep(self, training: Training, run_id: str) -> None:
        if self._lease is not None and not self._is_late:  # then the lease may be another's
            kept = {"run": run_id, "training": digest_json(training.made_with)}
            self._lease.require()
            (self._lease.output / MLFLOW_RUN).write(json.dumps(kept).encode())
