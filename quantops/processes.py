"""What the processes of a distributed training tell each other."""

from contextlib import nullcontext

import torch
import torch.distributed as dist


def several(group=None):
    """Whether ``group`` (None: the default one) has other processes than this one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def leads(group=None):
    """True in one process of ``group``, which speaks for all."""
    return not several(group) or dist.get_rank(group) == 0


def mean(values, group, device):
    """The mean over the processes of each of ``values``, Python numbers, the same in all of them."""
    if not several(group):
        return values
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t, group=group)
    return (t / dist.get_world_size(group)).tolist()


def unsynchronized(model):
    """While it is open a model in DDP sums no gradients: for forwards without the backward pass that DDP waits for."""
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()
