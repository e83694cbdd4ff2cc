"""How rows and noise come to the device on which a training computes."""

from itertools import cycle
from typing import Self

import torch
from torch import Tensor

from cvae_dist.model.tiling import Rows, tensor_of
from cvae_dist.training.device import free_memory

_SHARE_OF_MEMORY = 2  # rows that take at most half of a card's free memory stay there
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # which every device can gather


class Transfer:
    """Brings one small array after the other to a device; on the CPU it changes nothing.

    An array is copied to memory that the card reads by itself, so nobody waits while it travels. There are two such
    buffers. One is overwritten once what it held has arrived, which is long ago then.
    """

    def __init__(self, device: torch.device) -> None:
        self._buffers = None if device.type == "cpu" else cycle((_Pinned(device), _Pinned(device)))

    def __call__(self, values: Tensor) -> Tensor:
        """Return ``values``, of any shape, on the device."""
        return values if self._buffers is None else next(self._buffers).send(values)


class _Pinned:
    """Memory that a card reads by itself, and the event that says when it has."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def send(self, values: Tensor) -> Tensor:
        self._arrived.synchronize()
        if self._memory.numel() < values.nbytes:
            self._memory = torch.empty(values.nbytes, dtype=torch.uint8, pin_memory=True)
        staged = self._memory[: values.nbytes].view(values.dtype).view(values.shape).copy_(values)
        sent = staged.to(self._device, non_blocking=True, copy=True)
        self._arrived.record(torch.cuda.current_stream(self._device))
        return sent


class Home:
    """All rows of a training on its device: then batches are gathered there, and only their places travel."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._words: Tensor | None = None
        self._dtype = torch.uint8

    @classmethod
    def of(cls, device: torch.device, size: int) -> Self | None:
        """Return an empty one for ``size`` bytes of rows; None on the CPU, or where they would crowd a card."""
        if device.type == "cpu" or size * _SHARE_OF_MEMORY > free_memory(device):
            return None
        return cls(device)

    @property
    def is_empty(self) -> bool:
        """Whether :meth:`fill` is still to come."""
        return self._words is None

    def fill(self, rows: Rows) -> None:
        """Bring all rows, (n, n_features), to the device."""
        values = tensor_of(rows)
        self._dtype = values.dtype
        self._words = values.view(_WORDS[values.itemsize]).to(self._device)

    def gather(self, places: Tensor) -> Tensor:
        """Return rows as they were, (len(places), n_features), of ``places`` (int64) on the device."""
        assert self._words is not None
        return self._words.index_select(0, places).view(self._dtype)
