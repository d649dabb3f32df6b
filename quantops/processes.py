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


def mean(compute, count, group, device):
    """The mean over the processes of each of the ``count`` Python numbers that ``compute()`` gives, the same in all of
    them. Where it raises in one, none waits for it: RuntimeError in the others."""
    if not several(group):
        return compute()
    values, error = [0.0] * count, None
    try:
        values = compute()
    except Exception as raised:
        error = raised
    t = torch.tensor([*values, error is not None], dtype=torch.float64, device=device)
    dist.all_reduce(t, group=group)
    if error is not None:
        raise error
    *sums, failed = t.tolist()
    if failed:
        raise RuntimeError(f"{failed:.0f} of {dist.get_world_size(group)} processes raised an error; see theirs")
    return [v / dist.get_world_size(group) for v in sums]


def unsynchronized(model):
    """While it is open a model in DDP sums no gradients: for forwards without the backward pass that DDP waits for."""
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()


@torch.no_grad()
def average_gradients(parameters, group):
    """Sets each ``.grad`` to the mean over the processes; those that no process has stay None."""
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters or not several(group):
        return
    used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8, device=parameters[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX, group)
    kinds: dict[tuple, list] = {}
    for p, any_has_one in zip(parameters, used.tolist()):
        if any_has_one:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            kinds.setdefault((p.grad.dtype, p.grad.device), []).append(p.grad)
    for grads in kinds.values():
        flat = torch.cat([g.reshape(-1) for g in grads]).div_(dist.get_world_size(group))
        dist.all_reduce(flat, group=group)
        for g, v in zip(grads, flat.split([g.numel() for g in grads])):
            g.copy_(v.view_as(g))
