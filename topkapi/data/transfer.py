"""Copies between the CPU and a CUDA device that the host need not wait for, and streams beside the one in use.

On a CPU all of it is nothing: work there is done when the call that asks for it returns.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Moment = torch.cuda.Event | None
"""A point in a stream's work that others can wait for; None where there is nothing to wait for."""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; to a CUDA device through pinned memory, in the current stream, without waiting.

    The pinned copy may be dropped at once: PyTorch's allocator reuses it only after the stream has read it.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded one cannot be pinned


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU. From a CUDA device this thread waits for the current stream, and for nothing else."""
    if not tensor.is_cuda:
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    wait(now(tensor.device))
    return copy


def now(device: torch.device) -> Moment:
    """The end of what the current stream of `device` has been given so far."""
    if device.type != "cuda":
        return None
    moment = torch.cuda.Event(blocking=True)  # who waits for it sleeps, and leaves the core to the other threads
    moment.record(torch.cuda.current_stream(device))
    return moment


def wait(moment: Moment) -> None:
    """Make this thread wait until `moment` has come."""
    if moment is not None:
        moment.synchronize()


def follow(moment: Moment, device: torch.device) -> None:
    """What the current stream is given from now on starts when `moment` has come; the host goes on at once."""
    if moment is not None:
        torch.cuda.current_stream(device).wait_event(moment)


class Lane:
    """A stream of its own on `device`, for work beside the training step's."""

    def __init__(self, device: torch.device, urgent: bool = False) -> None:
        """`urgent` work goes before other streams' where both wait for a place on the device."""
        self.device = device
        self._stream = torch.cuda.Stream(device, priority=-1 if urgent else 0) if device.type == "cuda" else None

    def in_use(self) -> AbstractContextManager[Any]:
        """Within the block this thread's work goes to this lane."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def after(self, moment: Moment) -> None:
        """What the lane is given from now on starts when `moment` has come; the host goes on at once."""
        if self._stream is not None and moment is not None:
            self._stream.wait_event(moment)

    def now(self) -> Moment:
        """The end of what the lane has been given so far."""
        with self.in_use():
            return now(self.device)
