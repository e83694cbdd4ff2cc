"""The reference's network and training step in torch, as a yardstick of time and of loss under its own objective.

Written from the description of CompressionVAE 0.2.0: ReLU layers with dropout, one small network for every coordinate
of every flow step (no masks), a context as narrow as the latent, gated updates, unit-variance Gaussian likelihood.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

_MOST_HIDDEN = 64
_DROPOUT = 0.25
_BIAS = 0.001
_GATE_OFFSET = 1.0  # sigmoid(1 + s): a new flow keeps most of what it gets
_TINY = 1e-10  # what the reference adds before a logarithm

Floats = npt.NDArray[np.float32]


def default_cells(n_features: int, dim_latent: int) -> tuple[int, int]:
    """Return the two widths the reference chooses: 784 features and 2 latents give (512, 128)."""
    lowest, highest = (dim_latent - 1).bit_length(), n_features.bit_length()
    middle = lowest + max(highest - lowest + 1, 1) // 2 + 1
    largest = 2**highest // 2
    return largest, 2**middle if middle <= highest else largest // 2


class _Coordinate(nn.Module):
    """Target and gate of one coordinate, from the context and the coordinates before it."""

    def __init__(self, dim_latent: int, place: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim_latent + place, hidden)
        self.outer = nn.Linear(hidden, 2)

    def forward(self, seen: Tensor) -> Tensor:
        """Return (n, 2) of (n, dim_latent + place)."""
        result: Tensor = self.outer(torch.relu(self.inner(seen)))
        return result


class _Step(nn.Module):
    """One step of the flow, which leaves the coordinates in reversed order."""

    def __init__(self, dim_latent: int, dim_encoded: int, hidden: int) -> None:
        super().__init__()
        self.context = nn.Linear(dim_encoded, dim_latent)
        self.coordinates = nn.ModuleList(_Coordinate(dim_latent, place, hidden) for place in range(dim_latent))

    def forward(self, latent: Tensor, encoded: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent after the step and its gates, each (n, dim_latent)."""
        context = torch.relu(self.context(encoded))
        outputs = [
            network(torch.cat([context, latent[:, :place]], dim=1)) for place, network in enumerate(self.coordinates)
        ]
        target, raw = torch.stack(outputs, dim=1).unbind(dim=2)
        gate = torch.sigmoid(_GATE_OFFSET + raw)
        return (gate * latent + (1 - gate) * target).flip(1), gate


class Port(nn.Module):
    """The reference, for rows that are standardised already.

    Parameters
    ----------
    n_features, dim_latent : int
        Widths of a row and of a latent.
    cells_encoder : sequence of int, optional
        Widths of the encoder's layers; the decoder's are the same, reversed. Default: as the reference chooses.
    iaf_flow_length : int
        Steps of the flow.
    """

    def __init__(
        self, n_features: int, dim_latent: int, cells_encoder: Sequence[int] | None = None, iaf_flow_length: int = 5
    ) -> None:
        super().__init__()
        cells = tuple(cells_encoder or default_cells(n_features, dim_latent))
        hidden = min(cells[-1], _MOST_HIDDEN)
        self.encoder = _layers((n_features, *cells))
        self.head = _layers((cells[-1], 2 * hidden))
        self.mean = nn.Linear(hidden, dim_latent)
        self.logvar = nn.Linear(hidden, dim_latent)
        self.flow = nn.ModuleList(_Step(dim_latent, cells[-1], hidden) for _ in range(iaf_flow_length))
        self.decoder = _layers((dim_latent, *cells[::-1]))
        self.output = nn.Linear(cells[0], n_features)
        self.dim_latent = dim_latent
        _initialise(self)
        self._optimizer = torch.optim.Adam(self.parameters(), lr=1e-3, eps=1e-4, fused=True)  # its fastest form

    def posterior(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return what ``noise`` (None: zeros) becomes, its starting point's standard deviation, and every step's gates.

        Each is (n, dim_latent), of rows ``x``, (n, n_features).
        """
        encoded = self.encoder(x)
        for_mean, for_logvar = self.head(encoded).chunk(2, dim=1)
        latent, deviation = self.mean(for_mean), torch.exp(0.5 * self.logvar(for_logvar))
        if noise is not None:
            latent = latent + deviation * noise
        gates = []
        for step in self.flow:
            latent, gate = step(latent, encoded)
            gates.append(gate)
        return latent, deviation, gates

    def losses(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return the reference's two terms per row, each (n,): half the squared error, and one draw of the KL term."""
        latent, deviation, gates = self.posterior(x, noise)
        log_scales = sum(torch.log(scale + _TINY) for scale in (deviation, *gates))
        kl = (0.5 * latent.square() - 0.5 * noise.square() - log_scales).sum(dim=1)
        error = x - self.output(self.decoder(latent))
        return 0.5 * error.square().sum(dim=1), kl

    def train_step(self, batch: Floats) -> float:
        """Take one step of Adam on standardised rows, (n, n_features), and return the loss before it, in nats."""
        self.train()
        noise = torch.randn(len(batch), self.dim_latent)
        loss = sum(self.losses(torch.from_numpy(batch), noise)).mean()
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return loss.item()

    def loss(self, batch: Floats) -> Floats:
        """Return the loss of every row without dropout, (n,), in nats, with one draw of the noise."""
        self.eval()
        with torch.inference_mode():
            return sum(self.losses(torch.from_numpy(batch), torch.randn(len(batch), self.dim_latent))).numpy()

    def embed(self, batch: Floats) -> Floats:
        """Return the latents, (n, dim_latent), of standardised rows: the encoder's mean pushed through the flow."""
        self.eval()
        with torch.inference_mode():
            return self.posterior(torch.from_numpy(batch), None)[0].numpy()


def _layers(widths: Sequence[int]) -> nn.Sequential:
    """Return linear, ReLU and dropout for every pair of neighbouring widths."""
    triples = ([nn.Linear(*pair), nn.ReLU(), nn.Dropout(_DROPOUT)] for pair in itertools.pairwise(widths))
    return nn.Sequential(*itertools.chain.from_iterable(triples))


def _initialise(module: nn.Module) -> None:
    """Orthogonal weights of gain 1 and biases of 0.001, the reference's default."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.orthogonal_(layer.weight)
            nn.init.constant_(layer.bias, _BIAS)
