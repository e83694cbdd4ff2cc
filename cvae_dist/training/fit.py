"""Training on any rows that can be read, into a model directory or into memory: what the estimator calls."""

from cvae_dist.config import TrainConfig
from cvae_dist.events import OnEvent, ignore
from cvae_dist.store import Location
from cvae_dist.training.device import choose_device
from cvae_dist.training.loop import Trained, run
from cvae_dist.training.prepare import Training, TrainingData
from cvae_dist.training.resume import train_in
from cvae_dist.training.world import World


def fit(
    data: TrainingData,
    config: TrainConfig,
    directory: str | Location | None = None,
    on_event: OnEvent = ignore,
    *,
    overwrite: bool = False,
    earlier: Trained | None = None,
) -> Trained:
    """Train on rows; an interrupted training has the best weights so far.

    By default nothing is written, and ``earlier`` goes on where this is the same training with more steps. With a
    model ``directory`` the training there goes on, as for the verb, or with ``overwrite`` is discarded. Of the rows
    that ``data`` validates on, if it names any, 10,000 at most validate; then all others are trained on.

    Raises
    ------
    TrainingDiverged
        As for the verb; what was good before, if anything, is its ``trained``.
    """
    if data.validation is not None:
        config = config.model_copy(update={"train_valid_split": 1.0})
    world = World(device=choose_device(config.device))
    training = Training.of(data, config)
    if directory is not None:
        return train_in(Location.of(directory), training, overwrite, on_event, world)[0]
    goes_on = earlier is not None and training.asks_for_more(earlier.made_with)
    return run(training, on_event, earlier=earlier if goes_on else None, world=world)
