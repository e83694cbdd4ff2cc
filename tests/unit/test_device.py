"""Training on a card, as far as it can be seen without one: decisions, messages, and which operations meet where."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cvae_dist import CompressionVAE
from cvae_dist.config import ModelConfig, TrainConfig
from cvae_dist.errors import InvalidInput
from cvae_dist.events import OnEvent, ignore
from cvae_dist.model import kernels
from cvae_dist.model.kernels import computing_in
from cvae_dist.model.vae import VAE, decide
from cvae_dist.store import Moments
from cvae_dist.store.reader import ArrayRows
from cvae_dist.training import device, precision, transfer, world
from cvae_dist.training.device import choose_device, note, require_one_each
from cvae_dist.training.fit import fit
from cvae_dist.training.history import Figures
from cvae_dist.training.loader import Loader
from cvae_dist.training.prepare import Training, TrainingData
from cvae_dist.training.sampler import NO_ROWS, Sampler, Share
from cvae_dist.training.trainer import Trainer
from cvae_dist.training.transfer import Home, Transfer
from cvae_dist.training.validation import Validation
from cvae_dist.training.world import Membership, World, to_cpu
from tests.unit.test_world import _free_port

CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)
ROWS = np.random.default_rng(0).normal(size=(300, 12)).astype(np.float32)
WIDE = {"cells_encoder": (300, 300)}  # so that layers are large, for `kernels`
QUICK: dict[str, Any] = {
    "num_steps": 6,
    "test_every": 3,
    "batch_size": 32,
    "multi_start": False,
    "cells_encoder": (16,),
}


def machine_of(cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)


@pytest.mark.parametrize(
    ("asked", "cards", "local_rank", "expected"),
    [
        ("auto", 0, 0, "cpu"),
        ("cpu", 4, 1, "cpu"),
        ("auto", 1, 0, "cuda:0"),
        ("cuda", 4, 3, "cuda:3"),
        ("auto", 1, 3, "cuda:0"),  # which is its own where a launcher shows each rank one card
    ],
)
def test_which_device_a_rank_takes(
    asked: Any, cards: int, local_rank: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_of(cards, monkeypatch)
    assert choose_device(asked, local_rank) == torch.device(expected)


def test_a_card_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine_of(0, monkeypatch)
    with pytest.raises(InvalidInput, match=r"device='cuda' asks for a card, but torch .* --device cpu"):
        CompressionVAE(ROWS, device="cuda", logdir=tmp_path / "model").train(verbose=False)
    assert not (tmp_path / "model").exists()


def test_what_is_said_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="Some Card", total_memory=80e9, uuid="0-1")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert note(CARD, "auto") == "computing on card 0: Some Card, 80 GB"
    assert note(CPU, "auto") == ""
    assert note(CPU, "cpu") == "computing on the CPU, as asked for"
    assert (device.identity(CARD), device.identity(CPU)) == ("0-1", "cpu")


@pytest.mark.parametrize(("asked", "said"), [("auto", []), ("cpu", ["computing on the CPU, as asked for"])])
def test_a_training_says_where_it_computes_if_asked(
    asked: Any, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_of(0, monkeypatch)
    notes: list[str] = []
    train_rows(lambda event: notes.append(event.message), device=asked)
    assert [message for message in notes if message.startswith("computing")] == said


def test_a_training_goes_on_wherever_it_is_and_however_its_steps_are_computed(tmp_path: Path) -> None:
    train_rows(directory=tmp_path / "model")
    events: list[Any] = []
    train_rows(events.append, directory=tmp_path / "model", device="cpu", compile=True)
    assert "already trained" in events[-1].message


def train_rows(on_event: OnEvent = ignore, directory: Path | None = None, **settings: Any) -> VAE:
    data = TrainingData.in_memory(ArrayRows(ROWS), Moments.of(ROWS), (12,))
    return fit(data, TrainConfig(**(QUICK | settings)), directory and str(directory), on_event).vae


# ----------------------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("cards", [["cpu", "cpu"], ["a", "b"], ["a"]])
def test_ranks_with_a_card_each_or_none_at_all_may_train(cards: list[str]) -> None:
    require_one_each(cards)


@pytest.mark.parametrize(
    ("cards", "what"),
    [(["a", "b", "a"], "3 ranks .* rank 2 has that of another rank"), (["a", "cpu"], "2 ranks .* rank 1 has none")],
)
def test_ranks_that_share_a_card_are_refused(cards: list[str], what: str) -> None:
    with pytest.raises(InvalidInput, match=what + ".*Nothing was trained.*--device cpu"):
        require_one_each(cards)


@pytest.mark.timeout(30)
def test_all_ranks_refuse_before_they_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "identity", lambda device: "the only card")
    port, errors = _free_port(), []

    def join(rank: int) -> None:
        try:
            World(Membership(rank, 2, rank, 2, "127.0.0.1", port)).join()
        except InvalidInput as error:
            errors.append(str(error))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert all("rank 1 has that of another rank" in error for error in errors)


# ------------------------------------------------------------------------------------------- rows that travel or stay


def test_on_the_cpu_nothing_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", lambda: pytest.fail("there is no card"))
    values = torch.ones(3)
    assert Transfer(CPU)(values) is values


def test_a_buffer_is_overwritten_once_its_rows_have_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    course: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.name = f"buffer {sum(entry.startswith('new') for entry in course)}"
            course.append(f"new {self.name}")

        def synchronize(self) -> None:
            course.append(f"wait for {self.name}")

        def record(self, stream: object) -> None:
            course.append(f"{self.name} on {stream}")

    empty = torch.empty
    pinned: list[int] = []

    def allocate(size: int, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        pinned.extend([size] * pin_memory)
        return empty(size, dtype=dtype)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    monkeypatch.setattr(torch, "empty", allocate)
    buffers = transfer._Pinned(CPU), transfer._Pinned(CPU)  # "to" copies there too
    shapes: list[tuple[int, ...]] = [(4, 3), (4, 3), (4, 3), (2, 3), (0, 3), (5, 3)]
    given = [torch.full(shape, float(number)) for number, shape in enumerate(shapes)]
    sent = [buffers[number % 2].send(values) for number, values in enumerate(given)]
    for values, arrived in zip(given, sent, strict=True):
        assert torch.equal(values, arrived), "a batch was changed by those after it"
    assert pinned == [48, 48, 60], "buffers grow only for larger batches"
    assert course[:6] == [
        "new buffer 0", "new buffer 1", "wait for buffer 0", "buffer 0 on the stream of cpu",
        "wait for buffer 1", "buffer 1 on the stream of cpu",
    ]  # fmt: skip
    assert course[6:] == course[2:6] * 2


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8", "|u1", "<u2", "<i8", ">f4"])
def test_rows_at_home_on_a_device_come_as_the_same_bits(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (np.arange(301 * 5).reshape(301, 5) % 251).astype(dtype)
    sampler = Sampler(301, 32, 5, 4, window_rows=100)  # batches cross windows
    share = Share(sampler, NO_ROWS)
    with Loader(ArrayRows(rows), share, buffer_bytes=1) as loader:
        expected = [batch.x for batch, _ in zip(loader.batches(), range(25), strict=False)]
    monkeypatch.setattr(Home, "of", lambda device, size: Home(device))
    with Loader(ArrayRows(rows), share, buffer_bytes=1) as loader:
        found = [batch.x for batch, _ in zip(loader.batches(), range(25), strict=False)]
        assert loader._home is not None
        assert not loader._home.is_empty
        later = next(loader.batches(2, 3)).x
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype
        assert one.numpy().tobytes() == other.numpy().tobytes()
    assert later.shape == (32, 5)


def test_rows_stay_on_a_card_that_has_twice_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "free_memory", lambda device: 1000)
    assert Home.of(CARD, 500) is not None
    assert Home.of(CARD, 501) is None
    assert Home.of(CPU, 1) is None


# ------------------------------------------------------------------------------ operations on a card that is not there


MADE_UP = torch.device("meta")  # the one beside the CPU that every torch can differentiate on


CASES: list[dict[str, Any]] = [
    {"likelihood": "gaussian", "residual_blocks": 2},
    {"likelihood": "gaussian_per_feature", "iaf_flow_length": 2, "dim_latent": 4},
    {"likelihood": "student_t", "feature_normalization": True},
    {"likelihood": "bernoulli", "iaf_flow_length": 2, "dim_latent": 4},
    {"likelihood": "continuous_bernoulli"},
    {"likelihood": "gaussian_unit", "kl_weight": 0.0},
]


class Travels(TorchDispatchMode):
    """Counts the tensors that come from the CPU to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        from_cpu = any(isinstance(value, torch.Tensor) and value.is_cpu for value in args)
        self.count += from_cpu and isinstance(result, torch.Tensor) and result.device == MADE_UP
        return result


class Card:
    """A trainer on a card of tensors without values: operands of two devices are refused, and asking for a value too.

    Attributes
    ----------
    waits : list of int
        How many figures the trainer read from the card, whenever it did.
    """

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        rows = 1 / (1 + np.exp(-ROWS)) if "bernoulli" in settings["likelihood"] else ROWS
        data = TrainingData.in_memory(ArrayRows(rows), Moments.of(rows), (12,))
        training = Training.of(data, TrainConfig(**QUICK | WIDE | settings))
        vae = VAE.of(training.config, data.moments, "<f4")
        validation = Validation.read(data.reader, np.arange(40), vae.dim_latent, 0)
        monkeypatch.setattr(Transfer, "__init__", lambda self, device: None)
        monkeypatch.setattr(Transfer, "__call__", lambda self, values: values.to(MADE_UP))
        monkeypatch.setattr(FakeTensor, "tolist", lambda values: self._read(values))
        self.waits: list[int] = []
        self.norm = 1.0
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            for module in vae.modules():
                for name, value in [*module._parameters.items(), *module._buffers.items()]:
                    if value is not None:
                        moved = self.fake.from_tensor(value.detach()).to(MADE_UP)
                        weight = isinstance(value, torch.nn.Parameter)
                        setattr(module, name, torch.nn.Parameter(moved) if weight else torch.nn.Buffer(moved))
            self.trainer = Trainer(vae, training.config, validation, 9, dtype, World(device=MADE_UP))

    def _read(self, values: torch.Tensor) -> list[float]:
        assert values.device == MADE_UP
        self.waits.append(len(values))
        return [self.norm] * len(values)

    def step(self, dtype: torch.dtype = torch.float32) -> None:
        rows = torch.empty((32, 12), dtype=dtype, device=MADE_UP)
        self.trainer.advance(rows, np.arange(32), 32)

    def devices(self) -> set[torch.device]:
        """Return where all that the trainer keeps is."""
        return devices_of(self.trainer.state()) | {value.device for value in self.trainer.vae.buffers()}


def devices_of(state: Any) -> set[torch.device]:
    if isinstance(state, torch.Tensor):
        return {state.device}
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return set().union(*map(devices_of, values))


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [*((settings, torch.float32) for settings in CASES), *((settings, torch.bfloat16) for settings in CASES[:2])],
)
def test_a_step_computes_on_the_card_alone_and_waits_once(
    settings: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = Card(settings, dtype, monkeypatch)
    with card.fake, Travels() as travels:
        card.step()
        assert (card.waits, travels.count) == ([4], 1), "norm, losses and the wish to stop come back; noise goes there"
        card.norm = 100.0
        card.step(torch.uint8)  # its gradient is clipped
        assert card.trainer._optimizer.updates == 2
        assert card.waits == [4, 4]
        assert card.devices() == {MADE_UP}


def test_validation_reads_two_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(CASES[0], torch.float32, monkeypatch)
    with card.fake:
        card.step()
        card.trainer.test()
        assert card.waits == [4, 2]
        assert card.trainer.good_step == 1


def test_what_a_card_held_is_saved_and_restored_on_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(CASES[0], torch.float32, monkeypatch)
    with card.fake:
        card.step()
        saved = to_cpu(card.trainer.state())
        assert devices_of(saved) == {CPU}
        assert devices_of(saved["optimizer"]["adam"]["steps"]) == {CPU}, "tensors in lists, too"
        card.trainer.restore(saved)
        card.trainer.go_on_from(Figures(1, 1.0, 1.0, 1.0, "finished", 1.0), saved["parameters"])
        card.trainer._retreat()
        card.step()
        card.trainer.use_best_weights()
        assert card.devices() == {MADE_UP}


def test_precision_is_timed_where_the_model_is(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Card(CASES[0], torch.float32, monkeypatch)
    monkeypatch.setattr(precision, "_TIMED_STEPS", 1)
    with card.fake:
        exact, short = precision._times(card.trainer.vae, 64)
    assert min(exact, short) > 0


def test_a_state_of_the_cpu_is_not_copied() -> None:
    state = {"weights": [torch.ones(3)], "name": "x", "step": 3}
    found = to_cpu(state)
    assert found["weights"][0].data_ptr() == state["weights"][0].data_ptr()  # type: ignore[index]
    assert (found["name"], found["step"]) == ("x", 3)


# ------------------------------------------------------------------------------------------------------ compiled steps


def test_a_machine_that_cannot_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found")

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    with pytest.raises(
        InvalidInput, match=r"cannot compile .*No working C\+\+ compiler.*g\+\+, or train without --compile"
    ):
        train_rows(compile=True)


@pytest.mark.parametrize("settings", [CASES[0], pytest.param(CASES[1], marks=pytest.mark.heavy)])
def test_a_forward_pass_is_one_graph_in_either_type(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager", fullgraph=True))
    config, _ = decide(ModelConfig(**WIDE | settings), Moments.of(ROWS), "<f4", (12,))
    vae = VAE.of(config, Moments.of(ROWS), "<f4")
    rows, noise = torch.from_numpy(ROWS[:32]), torch.randn((32, vae.dim_latent))
    found = {}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        with computing_in(dtype):
            expected = vae(rows, noise)
        found[dtype] = kernels.compiled(vae, dtype)(rows, noise).reconstruction
        torch.testing.assert_close(found[dtype], expected.reconstruction, rtol=tolerance, atol=tolerance)
    assert not torch.equal(*found.values()), "each is compiled by itself"
    exported = torch.export.export(vae, (rows, noise)).module()(rows, noise)
    torch.testing.assert_close(exported.reconstruction, vae(rows, noise).reconstruction)


@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
@pytest.mark.parametrize(("precision", "apart"), [("float32", 1e-4), ("bf16", 1e-2)])
def test_compiled_steps_differ_by_rounding(precision: str, apart: float) -> None:
    data = TrainingData.in_memory(ArrayRows(ROWS), Moments.of(ROWS), (12,))
    asked = {**QUICK, **WIDE, **CASES[0], "num_steps": 20, "batch_size": 30, "precision": precision}
    models = [fit(data, TrainConfig(**asked, compile=chosen)).vae for chosen in (False, True)]
    one, other = (torch.cat([value.flatten() for value in vae.parameters()]) for vae in models)
    assert 0 < (one - other).norm() <= apart * one.norm()
