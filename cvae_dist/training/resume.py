"""Training into a model directory: whose it is, and what goes on there."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from cvae_dist.config import WITHOUT_EFFECT_ON_WEIGHTS
from cvae_dist.errors import InvalidInput, RankLost, SettingsChanged
from cvae_dist.events import Event, OnEvent, ignore
from cvae_dist.model.directory import delete_model, load_model
from cvae_dist.model.files import CHECKPOINTS, HISTORY, LOGS, MLFLOW_RUN, WEIGHTS, is_finished, read_description
from cvae_dist.store import Lease, Location
from cvae_dist.training.checkpoint import Checkpoints
from cvae_dist.training.history import Figures, History, finite
from cvae_dist.training.loop import Trained, diverged, run
from cvae_dist.training.prepare import MEMORY, Training, TrainingData
from cvae_dist.training.world import World


def train_in(
    place: Location, training: Training, overwrite: bool, on_event: OnEvent, world: World | None = None
) -> tuple[Trained, bool]:
    """Train into a model directory, under its lease, from where an earlier run stopped.

    Return the training, and whether it had ended before, so that there was nothing to do. All ranks of ``world`` call
    this, with the same arguments.
    """
    world = world or World()
    if not world.leads:
        return _follow(place, training, world)
    with world.informed():
        return _lead(place, training, overwrite, on_event, world)


def _follow(place: Location, training: Training, world: World) -> tuple[Trained, bool]:
    """Do what rank 0 decides."""
    decision = world.hear()
    if "rows" not in decision:
        world.close()
        if decision["error"]:
            raise RankLost(f"rank 0 has ended, and rank {world.rank} with it: {decision['error']}")
        return finished(place), True
    if decision["rows"] != training.data.fingerprint:
        raise RankLost(
            f"rank {world.rank} found other rows in {training.data.url} than rank 0, as the store was written to "
            "meanwhile. Nothing was trained; run the same command again"
        )
    return run(training, ignore, world=world), False


def _lead(
    place: Location, training: Training, overwrite: bool, on_event: OnEvent, world: World
) -> tuple[Trained, bool]:
    """Decide, and train with all ranks, if there is something to do."""
    _require_apart(place, training.data)

    def tell(message: str) -> None:
        on_event(Event("train", "note", message=message))

    with Lease.held(place, on_wait=tell) as lease:
        _require_ours(place)
        if overwrite:
            _discard(lease)
        earlier = None
        if is_finished(place):
            if not training.asks_for_more(_made_with(place)):
                return _nothing_to_do(place, training, on_event), True
            earlier = finished(place)
        state = _last_state(lease, training, earlier, tell)
        return run(training, on_event, lease, state, earlier, world), False


def finished(place: Location) -> Trained:
    """Return the finished training at ``place``, without what a longer one has recorded since."""
    figures = Figures(**read_description(place)["lineage"]["figures"])
    history = [record for record in History.read(place / HISTORY).records if record["step"] <= figures.steps]
    return Trained(load_model(place), history, figures, _made_with(place))


def _made_with(place: Location) -> Mapping[str, Any]:
    made_with: Mapping[str, Any] = read_description(place)["lineage"].get("made_with", {})
    return made_with


def _require_apart(place: Location, data: TrainingData) -> None:
    """Refuse a model directory inside the store that is trained on."""
    if data.url != MEMORY and place.lies_in(Location.of(data.url)):
        raise InvalidInput(
            f"the model {place} lies in the store {data.url} that it is trained on. Nothing was changed; "
            "name a directory of its own"
        )


def _require_ours(place: Location) -> None:
    """Refuse a directory in which a training would replace or delete files of somebody else."""
    if is_finished(place):
        read_description(place)
        return
    checkpoints = Checkpoints(place / CHECKPOINTS)
    ours = checkpoints.exist or (place / HISTORY).exists()  # a killed run may have left weights alone beside it
    if (checkpoints.foreign() and not checkpoints.exist) or ((place / WEIGHTS).exists() and not ours):
        raise InvalidInput(
            f"{place} holds files that cvae-dist did not write where a training keeps its own. "
            "Nothing was changed; name another directory for the model"
        )


def _discard(lease: Lease) -> None:
    """Delete what an earlier training left: first what it could go on from, then what makes it a model.

    So a training that is discarded never goes on, wherever this is killed.
    """
    Checkpoints(lease.output / CHECKPOINTS, lease.check).clear()
    lease.check()
    delete_model(lease.output)
    for name in (HISTORY, LOGS, MLFLOW_RUN):
        lease.check()
        (lease.output / name).delete()


def _last_state(
    lease: Lease, training: Training, earlier: Trained | None, tell: Callable[[str], None]
) -> dict[str, Any] | None:
    """Return what the last checkpoint of this training holds, and delete what a killed run left half-written."""
    checkpoints = Checkpoints(lease.output / CHECKPOINTS, lease.check)
    state = checkpoints.load(tell)
    if state and earlier and state["made_with"] == earlier.made_with:
        state = None  # that of the earlier training, which was killed just after its end
    if state:
        _require_same(lease.output, state["made_with"], training.made_with)
    checkpoints.sweep()
    lease.output.sweep_partial()
    return state


def _nothing_to_do(place: Location, training: Training, on_event: OnEvent) -> Trained:
    """Return the finished training at ``place``, or refuse when it was another one."""
    lineage = read_description(place)["lineage"]
    ended = finished(place)
    figures = ended.figures
    if later := _later_rows(training.data, lineage):
        given = training.asked.model_dump(mode="json", exclude=set(WITHOUT_EFFECT_ON_WEIGHTS), exclude_unset=True)
        _require_same(place, lineage["made_with"], {name: value for name, value in given.items() if value is not None})
        message = f"already trained, on {later}; --overwrite trains anew on all of them"
    else:
        _require_same(place, _made_with(place), training.made_with)
        message = f"already trained: {place} has all its {figures.steps} steps; --overwrite trains anew"
    if figures.stopped_because == "diverged":
        raise diverged(training.config, figures.steps, f"{place} holds the last good weights", ended)
    on_event(Event("train", "done", figures.steps, figures.steps, "steps", message, finite(asdict(figures))))
    return ended


def _later_rows(data: TrainingData, lineage: Mapping[str, Any]) -> str:
    """Say which rows of the store of a finished training it knew; empty where these are all that are there now.

    That a store grows, or replaces rows whose files have changed, is expected and no reason to refuse.
    """
    if data.store is None or data.url != lineage["store"] or data.fingerprint == lineage["made_with"]["rows"]:
        return ""
    then, now = lineage["held_out"]["rows"], data.reader.n_rows
    if data.store.holds_rows_of(lineage["made_with"]["rows"]):
        return f"{then:,} of what are now {now:,} rows"
    if data.store.follows(lineage["made_with"]["rows"]):
        return f"{then:,} rows, some of which were replaced since, of what are now {now:,}"
    return ""


def _require_same(place: Location, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on with what was made with other settings or rows than those of ``asked``."""
    changed = [name for name in asked if there.get(name) != asked[name]]
    if changed:
        differences = ", ".join(f"{name}: {there.get(name)!r} there, {asked[name]!r} asked for" for name in changed)
        raise SettingsChanged(
            f"the model at {place} was made with other settings or rows ({differences}). Nothing changed; "
            "go on with the same settings, name another directory, or use --overwrite to train it anew"
        )
