"""The processes that make a run together: the first one leads, the others follow.

``torchrun --nproc-per-node N`` starts them, and each finds the others by `launched`. The first one alone
reads the command line, files and clocks, decides what comes next, and writes. It announces every run, with
all that the run needs, and before every step which one it is; the others take the same step on rows of their
own. So runs, checkpoints and locks are those of one process, and a folder is nothing that they must share.

The numbers of all are added up in one place, `Processes.add_up`, as one flat tensor: gradients and loss, or
what feedback follows. torch's DistributedDataParallel does that during the backward pass, but for parameters
only. Feedback that learns by a gradient of its own is a buffer, Kolen-Pollack mirrors gradients that are
reduced and clipped, and an estimate of the Jacobian has no backward pass at all. The price is a transfer that
nothing hides.

gloo carries what is on the CPU, NCCL what is on a GPU, of which every process has its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from localgpt_core.common.validation import Refusal, require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ALONE", "Group", "ProcessLost", "Processes", "launched"]

WORDS = ("advance", "evaluate", "end")
PATIENCE = timedelta(minutes=10)  # for what another process does between two steps, diagnostics included
SPOKEN = "spoken"  # counts who has said why a run ends


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or does not answer."""


class Processes:
    """One process alone: what several do together, it need not do.

    Attributes:
        rank: The number of this process, from 0.
        count: How many there are.
    """

    rank, count = 0, 1

    def device(self, device: torch.device) -> torch.device:
        """Return the device of this process where ``device`` is asked for."""
        return device

    @contextmanager
    def making(self, job: Any) -> Iterator[None]:
        """Lead the others through the run ``job`` inside the ``with`` block."""
        yield

    def tell(self, word: str) -> None:
        """Tell the others the next step of the run, one of `WORDS`."""

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum of those of all processes, in place and equal to the last bit.

        ``tensors`` have the same shapes and the same type in every process.
        """

    def take_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Give each tensor the numbers that it has in the first process, in place."""

    def require_same(self, tensors: Sequence[Tensor]) -> None:
        """Raise ``RuntimeError`` unless every process has the numbers of the first one, to the last bit."""

    def end(self) -> None:
        """Let the others go."""


ALONE = Processes()


class Group(Processes):
    """The processes that the environment describes as ``torchrun`` does: RANK, WORLD_SIZE, MASTER_ADDR, ...

    Built once in each process; it waits for the others.

    Raises:
        ProcessLost: By every method, if another process ended or does not answer for ten minutes.
    """

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self._dist, self._jobs, self._left = dist, 0, False
        on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
        with self._talking():
            store, self.rank, self.count = next(dist.rendezvous("env://", timeout=PATIENCE))
            self._store = dist.PrefixStore("localgpt", store)
            kinds = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
            options = {"store": store, "rank": self.rank, "world_size": self.count, "timeout": PATIENCE}
            dist.init_process_group(kinds, **options)

    @contextmanager
    def _talking(self) -> Iterator[None]:
        """Name what goes wrong between the processes."""
        if self._left:
            raise ProcessLost("a run has failed, and its processes with it")
        try:
            yield
        except RuntimeError as error:
            first_line = str(error).partition("\n")[0]
            said = f"another process of this run ended or does not answer: {first_line}"
            raise ProcessLost(said) from error

    def device(self, device: torch.device) -> torch.device:
        """Return the GPU of this process, by its number on its machine; the CPU is everyone's.

        Raises:
            ValueError: For one GPU by its number, or where this machine has too few.
        """
        import torch

        if device.type == "cpu":
            return device
        allowed = "must be 'cuda': each process has a GPU of its own"
        require(device.index is None, "device", str(device), allowed)
        own, there = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        require(own < there, "device", "cuda", f"{there} are too few: process {own} needs one of its own")
        torch.cuda.set_device(own)
        return torch.device("cuda", own)

    @contextmanager
    def making(self, job: Any) -> Iterator[None]:
        """Lead the others through the run ``job``; where it fails here, they fail with it.

        What is refused, they refuse as well, and wait for the next run.
        """
        self._announce(job)
        try:
            yield
        except Refusal:
            self.tell("end")
            raise
        except BaseException as error:
            if not isinstance(error, ProcessLost):
                self.speaks()
            self.leave()
            raise
        self.tell("end")

    def _announce(self, job: Any) -> None:
        with self._talking():
            self._store.set(f"job/{self._jobs}", "ready")
            self._dist.broadcast_object_list([job], 0, device="cpu")
        self._jobs += 1

    def jobs(self) -> Iterator[Any]:
        """Yield what the first process announces, until it lets go of the others."""
        while True:
            self._wait(f"job/{self._jobs}")
            received = [None]
            with self._talking():
                self._dist.broadcast_object_list(received, 0, device="cpu")
            self._jobs += 1
            if received[0] is None:
                self.leave()
                return
            yield received[0]

    def _wait(self, key: str) -> None:
        """Wait for ``key`` as long as it takes: the first process may have other things to do for hours."""
        while True:
            with self._talking():
                try:
                    return self._store.wait([key], PATIENCE)
                except self._dist.DistStoreError:
                    continue

    def tell(self, word: str) -> None:
        """Tell the others the next step of the run."""
        self._broadcast(WORDS.index(word))

    def heard(self) -> str:
        """Return what the first process tells."""
        return WORDS[self._broadcast(0)]

    def _broadcast(self, number: int) -> int:
        import torch

        sent = torch.tensor([number])
        with self._talking():
            self._dist.broadcast(sent, 0)
        return int(sent)

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum of those of all processes: one transfer of one flat tensor."""
        import torch

        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
        with self._talking():
            self._dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(total.view(tensor.shape))

    def take_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Add zeros to the numbers of the first process."""
        for tensor in tensors if self.rank else ():
            tensor.detach().zero_()
        self.add_up(tensors)

    def require_same(self, tensors: Sequence[Tensor]) -> None:
        """Compare one number for each tensor, the sum of its bits."""
        import torch

        own = torch.stack([t.detach().reshape(-1).view(torch.uint8).sum() for t in tensors])
        first = own.clone() if self.rank == 0 else torch.zeros_like(own)
        self.add_up([first])
        differs = (own != first).any().to(own)[None]
        self.add_up([differs])
        if differs:
            raise RuntimeError("the processes come to different numbers: they need one kind of device")

    def speaks(self) -> bool:
        """Return whether nobody has said yet why the run ends, and this process is to say it."""
        try:
            return self._store.add(SPOKEN, 1) == 1
        except RuntimeError:  # the store ended with the process that kept it
            return self.rank == 0

    def leave(self) -> None:
        """Take part in nothing any more: what the others do together with this process fails."""
        if not self._left:
            self._left = True
            self._dist.destroy_process_group()

    def end(self) -> None:
        """Let the others go."""
        if not self._left:
            self._announce(None)
            self.leave()


@cache
def launched() -> Processes:
    """Return the processes that ``torchrun`` has started this one with, which wait for each other here."""
    return ALONE if os.environ.get("WORLD_SIZE", "1") == "1" else Group()
