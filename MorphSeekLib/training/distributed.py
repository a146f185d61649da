"""Several processes that share a training's pairs, through Lightning Fabric (torchrun, SLURM)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..protocol.errors import Cancelled, MorphSeekError


class World:
    """The processes of a run. Without Fabric: one, and nothing is exchanged.

    Used as a context, it ends the connection to the others at its end: a process that is left to end with the
    connection open can abort while the interpreter closes, whatever it did before.
    """

    def __init__(self, fabric: Any = None) -> None:
        self._fabric = fabric
        self.rank: int = fabric.global_rank if fabric is not None else 0
        self.size: int = fabric.world_size if fabric is not None else 1

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fabric is not None:
            torch.distributed.destroy_process_group()

    @property
    def device(self) -> torch.device | None:
        """This process's device, where Fabric chose one."""
        return self._fabric.device if self._fabric is not None else None

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Add up the gradients of all processes, in one message."""
        if self.size == 1:
            return
        # every process must send the same tensors
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        flat = self._fabric.all_reduce(flat, reduce_op="sum")
        for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = grad.view_as(p).clone()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the processes."""
        return values if self.size == 1 else self._fabric.all_reduce(values, reduce_op="mean")

    def mean_figures(self, figures: dict[str, float], count: int) -> dict[str, float]:
        """Return means over all processes' validation pairs, weighted by their numbers."""
        if self.size == 1:
            return figures
        gathered = self._gather((figures, count))
        names = dict.fromkeys(name for f, _ in gathered for name in f)
        total = {name: sum(c for f, c in gathered if name in f) for name in names}
        return {name: sum(f[name] * c for f, c in gathered if name in f) / max(total[name], 1) for name in total}

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that exchanges nothing, and leave it with all other processes: when one of them fails, all
        raise, so that none waits for it in the next exchange.

        Raises:
            what the block raised; where only another process's block did, Cancelled, or a MorphSeekError that says
            which.
        """
        problem = None
        try:
            yield
        except Exception as found:
            problem = found
        if self.size > 1:
            self._agree(problem)
        if problem is not None:
            raise problem

    def _agree(self, problem: Exception | None) -> None:
        """Raise where another process has a problem and this one has none."""
        count = torch.tensor(float(problem is not None), device=self.device)
        if float(self._fabric.all_reduce(count, reduce_op="sum")) == 0:
            return
        told = self._gather(None if problem is None else (isinstance(problem, Cancelled), str(problem)))
        if problem is not None:
            return
        rank, (cancelled, text) = next((rank, found) for rank, found in enumerate(told) if found is not None)
        if cancelled:
            raise Cancelled
        raise MorphSeekError(f"This training stopped because process {rank} of {self.size} could not go on: {text}")

    def _gather(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found


def join(device: str) -> World:
    """Return the world that torchrun or SLURM started this process in; a world of one where neither did.

    Raises:
        MorphSeekError: several processes were started, but Lightning Fabric is not installed.
    """
    size = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
    if size == 1:
        return World()
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise MorphSeekError(
            "Training in several processes needs Lightning Fabric: pip install lightning-fabric."
        ) from error
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or size)
    gpu = device != "cpu" and torch.cuda.is_available()
    fabric = Fabric(
        accelerator="cuda" if gpu else "cpu", devices=local, num_nodes=max(1, size // local), strategy="ddp"
    )
    fabric.launch()
    return World(fabric)
