"""Several processes under torchrun; every function does nothing, or the obvious, when there is only one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from idml.errors import UserError
from idml.launch import check_environment as check_environment
from idml.launch import local_rank as local_rank
from idml.launch import rank as rank
from idml.launch import warn_of_leftovers
from idml.launch import world_size as world_size
from idml.rendezvous import join
from idml.signals import stop_when_parent_dies

ResultT = TypeVar("ResultT")


def setup(device_type: str) -> None:
    """Join the process group that torchrun describes in the environment (NCCL for CUDA, gloo otherwise).

    Raises:
        UserError: it is described in part only, or not all of its processes come in time.
    """
    check_environment()
    warn_of_leftovers()
    if world_size() == 1 or dist.is_initialized():
        return
    stop_when_parent_dies()
    join("nccl" if device_type == "cuda" else "gloo")


def shutdown() -> None:
    """Leave the process group."""
    global _signal_group
    if dist.is_initialized():
        dist.destroy_process_group()
    _signal_group = None


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def gather_objects(value: Any) -> list[Any]:
    """The value of every rank, in their order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


_signal_group: Any = None


def highest(code: int) -> int:
    """The largest of all ranks' numbers; over gloo, so that no GPU is made to wait. To be called on every rank."""
    global _signal_group
    if not dist.is_initialized():
        return code
    if _signal_group is None:
        _signal_group = dist.new_group(backend="gloo")
    number = torch.tensor(code)
    dist.all_reduce(number, op=dist.ReduceOp.MAX, group=_signal_group)
    return int(number)


def from_main(function: Callable[[], ResultT]) -> ResultT:
    """What the main process finds, on every rank; a UserError of it too. To be called on every rank."""
    result: ResultT | UserError | None = None
    if is_main():
        try:
            result = function()
        except UserError as error:
            if not dist.is_initialized():
                raise
            result = error
    result = gather_objects(result)[0]
    if isinstance(result, UserError):
        raise result
    return result


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, as a new tensor; the tensor itself when there is one process."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


@torch.no_grad()
def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite each tensor, in place, with that of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def share_of(count: int, number: int) -> int:
    """How many of ``count`` rows, dealt out to the ranks in turn, fall to rank ``number``."""
    return len(range(number, count, world_size()))


def gather_batch(rows: Tensor, count: int) -> Tensor:
    """The global batch whose rows were dealt out to the ranks in turn, in its order, on every rank and its device.

    Args:
        rows: (b, ...) this rank's share; row i is row ``i * world_size + rank`` of the whole.
        count: rows of the global batch; every rank has at least one.

    Returns:
        (count, ...). A loss of the whole, computed on every rank alike, gives this rank's rows their gradient times
        the number of ranks: DDP divides by that, so the network's gradient is that of one process with the whole batch.
    """
    return rows if not dist.is_initialized() else _GatherBatch.apply(rows, count)


class _GatherBatch(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, count: int) -> Tensor:
        most = share_of(count, 0)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world_size())]
        dist.all_gather(parts, padded)
        # Row i of every part, then row i + 1: the ranks that lack a last row come last.
        return torch.stack(parts, dim=1).flatten(0, 1)[:count]

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][rank() :: world_size()] * world_size(), None


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """The mean over all ranks of the gradients that there are, for parameters outside DDP."""
    if dist.is_initialized():
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()


def gather_interleaved(columns: Sequence[Tensor]) -> list[Tensor]:
    """Rows that were dealt out to the ranks in turn, back in their order, on every rank.

    Args:
        columns: tensors of this rank's n_r rows each: row i is row ``i * world_size + rank`` of the whole. On the CPU.

    Returns:
        As many tensors with all rows.
    """
    if not dist.is_initialized():
        return list(columns)
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, [column.cpu() for column in columns])
    whole = []
    for number in range(len(columns)):
        pieces = [part[number] for part in parts]
        merged = torch.empty(sum(map(len, pieces)), *pieces[0].shape[1:], dtype=pieces[0].dtype)
        for index, piece in enumerate(pieces):
            merged[index :: world_size()] = piece
        whole.append(merged)
    return whole
