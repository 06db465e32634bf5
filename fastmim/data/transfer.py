# SPDX-License-Identifier: Apache-2.0
"""Batches from the ring to the device that trains."""

import contextlib
from typing import Any

import torch
from torch import Tensor

from fastmim.data.workers import Ring


class Transfer:
    """Copies tensors to ``device``; on the CPU they stay where they are, in the ring.

    On CUDA the ring is page-locked and the copy runs on a stream of its own, beside the step before; only the copy is
    waited for before the memory is filled again, never the step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._locked: Ring | None = None

    def lock(self, ring: Ring | None) -> None:
        """Page-locks a ring. After the workers were forked: they share the memory, but not the driver's state."""
        if self._stream is not None and ring is not None and self._locked is None:
            code = torch.cuda.cudart().cudaHostRegister(ring.memory.data_ptr(), ring.memory.numel(), 0)
            if int(code) == 0:
                self._locked = ring
            else:  # copies are slower then, not wrong; but the next kernel would raise what the driver remembers
                with contextlib.suppress(RuntimeError):
                    torch.zeros(1, device=self.device)

    def unlock(self) -> None:
        """Gives the memory back."""
        if self._locked is not None:
            torch.cuda.cudart().cudaHostUnregister(self._locked.memory.data_ptr())
            self._locked = None

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors on the device; what was copied may be overwritten at once."""
        if self._stream is None:
            return {name: value.to(self.device) for name, value in tensors.items()}
        with torch.cuda.stream(self._stream):
            copies = {name: value.to(self.device, non_blocking=True) for name, value in tensors.items()}
        self._stream.synchronize()  # this batch's copy, which did not wait for any computation
        for value in copies.values():
            value.record_stream(torch.cuda.current_stream(self.device))
        return copies
