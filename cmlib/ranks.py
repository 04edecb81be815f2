"""More than one process, as torchrun starts them: who this one is, which rows are its own, and how shares become a whole.

Before `joined`, or without torchrun, there is one rank, and everything here leaves its argument as it is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Value = TypeVar("Value")
_SIZE_AT: dict[Any, tuple[int, str]] = {  # which argument says how many, and its name
    torch.randn: (0, "size"),
    torch.rand: (0, "size"),
    torch.randint: (-1, "size"),
    torch.multinomial: (1, "num_samples"),
}


def here() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this is the rank that speaks and writes."""
    return here()[0] == 0


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that torchrun started are one group (nccl on GPUs, a GPU each; else gloo), and the first prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield
        return
    from accelerate import PartialState

    PartialState(cpu=not torch.cuda.is_available())
    with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if is_first() else nowhere):
        yield
    dist.destroy_process_group()  # only where all went well: after an error the others wait for torchrun to end them


def dealt(parts: Sequence[Any], work: Callable[[Any], Tensor]) -> Tensor:
    """torch.cat([work(part) for part in parts]), the parts dealt to the ranks in turn; every rank gets the whole.

    Each part is computed once and nothing is padded. As the parts don't depend on the number of ranks, nor do the bits.
    """
    rank, world = here()
    mine = [work(part) for part in parts[rank::world]]
    if world == 1:
        return torch.cat(mine)
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, mine)
    return torch.cat([shares[k % world][k // world] for k in range(len(parts))])


def gathered(rows: Tensor) -> Tensor:
    """The whole batch, of which each rank has every world-th row."""
    world = here()[1]
    if world == 1:
        return rows
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, rows.cpu())
    whole = rows.new_empty(sum(map(len, shares)), *rows.shape[1:])
    for k, share in enumerate(shares):
        whole[k::world] = share.to(rows.device)
    return whole


def told(value: Value) -> Value:
    """The first rank's `value`, on all ranks."""
    if here()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def alike(model: nn.Module) -> None:
    """Give every rank the first one's weights."""
    if here()[1] > 1:
        for value in model.state_dict().values():
            dist.broadcast(value, src=0)


class _Rows(TorchFunctionMode):
    """Draws whose first axis is this rank's batch become its rows of the draw for the whole batch."""

    def __init__(self, mine: int, whole: int):
        self.mine, self.whole = mine, whole
        super().__init__()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("generator") is None:
            return function(*args, **kwargs)
        if function not in _SIZE_AT:
            made = function(*args, **kwargs)
            if isinstance(made, Tensor) and made.ndim and len(made) == self.mine:
                raise ValueError(
                    f"{function.__name__} cannot be shared by processes; draw by torch.randn, rand, randint or multinomial"
                )
            return made
        at, name = _SIZE_AT[function]
        holder: Any = kwargs if name in kwargs else (args := list(args))
        place = name if name in kwargs else at
        size = (holder[place],) if isinstance(holder[place], int) else tuple(holder[place])
        if size[0] != self.mine:
            return function(*args, **kwargs)
        holder[place] = self.whole if isinstance(holder[place], int) else (self.whole, *size[1:])
        rank, world = here()
        return function(*args, **kwargs)[rank::world]


def rows(mine: int, whole: int) -> AbstractContextManager[Any]:
    """Inside, what an objective draws from its generator for its `mine` images is what it would draw if it had the `whole`
    batch, of which this rank has every world-th row; all ranks seed the generator alike. So the loss of an image does not
    depend on the number of ranks. The batch must be the first axis of what is drawn."""
    return nullcontext() if here()[1] == 1 else _Rows(mine, whole)
