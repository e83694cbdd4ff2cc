"""The verb ``train``: rows to a model."""

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cvae_dist.config import TrainConfig, make_config
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import Location, RowStore
from cvae_dist.store.urls import StorageOptions
from cvae_dist.training.history import Figures

if TYPE_CHECKING:
    from distributed import Client


@dataclass(frozen=True)
class TrainResult(Figures):
    """How a training ended, and where its model is.

    Attributes
    ----------
    model : str
        URL of the model directory.
    nothing_to_do : bool
        The training had ended before; the other figures are of that end.
    """

    model: str
    nothing_to_do: bool = False


def train(
    store: str | os.PathLike[str] | RowStore,
    model: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    overwrite: bool = False,
    launcher: str = "auto",
    max_restarts: int = 5,
    timeout: float = 60.0,
    client: "Client | None" = None,
    storage_options: StorageOptions | None = None,
    on_event: OnEvent = ignore,
    **settings: Any,
) -> TrainResult:
    """Train a model on the rows of a store, on the CPU or an NVIDIA card. Goes on by itself after an interruption.

    A finished model goes on too where only num_steps is larger than it was. It goes on from its best weights and at
    its last step, with a fresh optimiser and a new warm-up of the learning rate. The result is not, to the bit, the
    model of a training that was longer from the start.

    Parameters
    ----------
    store : path, URL or RowStore
        Zarr store of rows, made by ingest.
    model : path or URL
        Directory of the model to write.
    config : TrainConfig
        All settings at once.
    overwrite : bool
        Train anew and replace the model that is there, whatever its settings.
    launcher : str
        Where the ranks of the training run, processes that share every batch: auto (this process; as one rank of
        several where torchrun, srun or a PyTorchJob started it), local:N (N processes on this machine), env (as auto,
        but several ranks or an error), dask (one rank on each worker of the cluster). The model does not depend on it,
        but for rounding.
    max_restarts : int
        How often lost ranks are started again. They go on from the last checkpoint. For local:N and dask.
    timeout : float
        Seconds after which a rank that does not answer counts as lost.
    client : distributed.Client, optional
        Cluster for launcher="dask".
    storage_options : Mapping, optional
        Options of the file system, for fsspec.
    on_event : callable
        Listener for progress.
    **settings
        Single settings of a TrainConfig. They win over config.

    Returns
    -------
    TrainResult

    Raises
    ------
    SourceNotFound, InvalidInput
        There is no such store, it has no rows, a setting is unknown or out of range, or other files are at the model.
    SettingsChanged, OutputLocked
        The model was begun with other settings or on other rows, or another process is training it.
    RankLost, RankFailed
        Ranks ended, or did not answer, more often than max_restarts times; a rank failed by itself.
    TrainingDiverged
        The loss ran away or was not finite, with a thousandth of the learning rate too. The last good weights are kept.
    Corrupt, StorageFailed
        The rows or the checkpoints are damaged, or the model cannot be written.
    """
    from cvae_dist.launch.launcher import launch, membership
    from cvae_dist.launch.rank import Task

    config = make_config(TrainConfig, (config.model_dump(exclude_unset=True) if config else {}) | settings)
    rows = store if isinstance(store, RowStore) else RowStore.open(Location.of(store, storage_options))
    place = Location.of(model, storage_options)
    task = Task(str(rows.location), str(place), config, overwrite, storage_options, timeout)
    result = launch(launcher, task, on_event, max_restarts, client)
    if result is None:
        figures, nothing_to_do = task.run(membership(launcher), on_event, rows)
        result = {**asdict(figures), "nothing_to_do": nothing_to_do}
    return TrainResult(model=str(place), **result)
