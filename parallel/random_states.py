"""The states of a rank's random generators, as a run saves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class RandomStates:
    """Generators of one rank. Nothing in the models draws numbers while it trains; what a user adds may."""

    cpu: bytes
    device: bytes
    """Empty on a rank without a GPU."""

    @staticmethod
    def now(device: torch.device) -> RandomStates:
        """This rank's states."""
        own = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0, dtype=torch.uint8)
        return RandomStates(bytes(torch.get_rng_state().numpy()), bytes(own.numpy()))

    def restore(self, device: torch.device) -> None:
        """Set this rank's generators."""
        torch.set_rng_state(_tensor(self.cpu))
        if self.device and device.type == "cuda":
            torch.cuda.set_rng_state(_tensor(self.device), device)

    @staticmethod
    def write(path: Path, states: Sequence[RandomStates]) -> None:
        """Write the states of all ranks, in their order."""
        with path.open("wb") as file:
            np.savez(
                file,
                cpu=np.stack([np.frombuffer(one.cpu, dtype=np.uint8) for one in states]),
                device=np.stack([np.frombuffer(one.device, dtype=np.uint8) for one in states]),
            )

    @staticmethod
    def read(path: Path) -> list[RandomStates]:
        """The states of all ranks that wrote them."""
        with np.load(path, allow_pickle=False) as arrays:
            pairs = zip(arrays["cpu"], arrays["device"], strict=True)
            return [RandomStates(cpu.tobytes(), device.tobytes()) for cpu, device in pairs]


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
