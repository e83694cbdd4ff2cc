"""Where a training computes: the CPU, or a card."""

from collections.abc import Sequence

import torch

from cvae_dist.config import Device
from cvae_dist.errors import InvalidInput

CPU = torch.device("cpu")
_NO_CARD = "cpu"


def choose_device(asked: Device, local_rank: int = 0) -> torch.device:
    """Return where a rank computes; ``auto`` takes a card where torch sees one.

    ``local_rank`` counts the ranks of this machine. Each of them takes the next card.

    Raises
    ------
    InvalidInput
        A card is asked for, and torch sees none.
    """
    if asked == "cpu":
        return CPU
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())
    if asked == "auto":
        return CPU
    why = "finds no card with a driver that it can use" if torch.version.cuda else "is built without CUDA"
    raise InvalidInput(
        f"device='cuda' asks for a card, but torch {torch.__version__} {why}. Nothing was trained; install a torch "
        "with CUDA beside a driver that suits it, or train on the CPU with --device cpu"
    )


def note(device: torch.device, asked: Device) -> str:
    """Say where a training computes; empty where that is the CPU, and nobody asked."""
    if device.type != "cuda":
        return "computing on the CPU, as asked for" if asked == "cpu" else ""
    card = torch.cuda.get_device_properties(device)
    return f"computing on card {device.index}: {card.name}, {card.total_memory / 1e9:.0f} GB"


def identity(device: torch.device) -> str:
    """Return what no other card has, whatever its number in this process; the CPUs of all ranks have the same."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else _NO_CARD


def require_one_each(cards: Sequence[str]) -> None:
    """Refuse ranks that share a card, or some of which have none; ``cards`` are the identities by rank.

    Raises
    ------
    InvalidInput
        It is so.
    """
    without = [rank for rank, card in enumerate(cards) if card == _NO_CARD]
    second = [rank for rank, card in enumerate(cards) if card in cards[:rank]]
    if len(without) == len(cards) or not (without or second):
        return
    what = f"rank {without[0]} has none" if without else f"rank {second[0]} has that of another rank"
    raise InvalidInput(
        f"{len(cards)} ranks that compute on cards need one each, but {what}. Nothing was trained; start at most as "
        "many ranks on a machine as it has cards, or train on the CPU with --device cpu"
    )


def free_memory(device: torch.device) -> int:
    """Return how many bytes of a card are free."""
    return int(torch.cuda.mem_get_info(device)[0])
