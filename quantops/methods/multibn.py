"""A batch norm for each width of a network: one width's activations are distributed unlike another's."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantops.nn import PerThread, in_backward
from quantops.state import Settings

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def refuse_recomputing(part):
    """RuntimeError within the backward pass of a joint_loss, where nothing says which width a checkpointed part had."""
    if not torch.compiler.is_compiling() and part.joint_graph and in_backward():
        raise RuntimeError(
            "a checkpointed forward was computed again in the backward pass of a joint_loss, where its "
            "width is not known: use quantops.joint_step; to train at one width call quantops.set_bits"
        )


class MultiBatchNorm(Settings, nn.Module):
    """Batch norms of one layer, of which the entry ``index`` of a buffer says which is used: no width recompiles.

    Parameters ``weight`` and ``bias`` and buffers ``running_mean`` and ``running_var`` are those of BatchNorm in rows,
    (widths, channels); ``num_batches_tracked`` is (widths,), ``index`` 0-dim; all are in the state dict. Made from a
    BatchNorm1d, 2d or 3d, whose values every row starts from and whose Parameter objects stay (with another shape), so
    that optimizers made before their first step stay valid. The rows that are not used get gradients of 0.
    """

    is_layer = True

    def __init__(self, norm, widths):
        super().__init__()
        self.kind, self.widths, self.features = type(norm), widths, norm.num_features
        self.eps, self.momentum, self.training = norm.eps, norm.momentum, norm.training
        for name in ("weight", "bias"):
            parameter = getattr(norm, name)
            if parameter is not None:
                parameter.data = self._rows(parameter.data)
                parameter.grad = None
            self.register_parameter(name, parameter)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(norm, name)
            self.register_buffer(name, None if buffer is None else self._rows(buffer))
        device = next((t.device for t in (*norm.parameters(), *norm.buffers())), None)
        self.joint_graph = False  # as in TruncQuantWeight
        self.given = PerThread()  # the index, while a thread goes through the widths
        self.register_buffer("index", torch.zeros((), dtype=torch.int64, device=device))

        self.counts = {"index": range(len(widths))}
        self.select(0)

    def select(self, place):
        """Selects the width at ``place`` of the network's widths, in place: nothing recompiles."""
        self.write(index=place)

    def settings(self):
        return {"method": "truncquant", "widths": list(self.widths)}

    def _rows(self, t):
        return t.detach().expand(len(self.widths), *t.shape).clone()

    def forward(self, x):
        """BatchNorm of the width that is selected."""
        refuse_recomputing(self)
        self.kind._check_input_dim(self, x)
        given = self.given.get()
        if given is None and not torch.compiler.is_compiling() and self.versions() != self.noted:
            self.check_written()
        # A copy: autograd keeps it, and the width may change before the backward pass.
        at = (self.index.clone() if given is None else given).reshape(1)
        weight, bias, mean, var = (
            None if t is None else t.index_select(0, at).squeeze(0)
            for t in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        tracks = mean is not None
        y = F.batch_norm(x, mean, var, weight, bias, self.training or not tracks, self.momentum, self.eps)
        if self.training and tracks:
            with torch.no_grad():
                self.running_mean.index_copy_(0, at, mean.unsqueeze(0))
                self.running_var.index_copy_(0, at, var.unsqueeze(0))
                self.num_batches_tracked.index_add_(0, at, torch.ones_like(at))
        return y

    def plain(self, place):
        """The BatchNorm of one width, a copy."""
        norm = self.kind(self.features, self.eps, self.momentum, self.weight is not None, self.running_mean is not None)
        norm.train(self.training)
        for name in ("weight", "bias"):
            parameter = getattr(self, name)
            if parameter is not None:
                setattr(norm, name, nn.Parameter(parameter.detach()[place].clone(), parameter.requires_grad))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            buffer = getattr(self, name)
            if buffer is not None:
                setattr(norm, name, buffer[place].clone())
        return norm

    def extra_repr(self):
        return f"{self.kind.__name__}, {self.features}, widths={self.widths}, eps={self.eps}, momentum={self.momentum}"


def check_norms(model):
    """ValueError, naming the module, for a batch norm that cannot have a row per width."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and type(module) not in KINDS:
            raise ValueError(
                f"{name}: expected BatchNorm1d, 2d or 3d, got {type(module).__name__}; batch_norm=False "
                "leaves it as it is, shared by all widths"
            )
        if isinstance(module, _BatchNorm) and module.momentum is None:
            raise ValueError(f"{name}: expected a number as momentum, got None")


def replace(model, swap):
    """Puts ``swap(module)`` in the place of each module for which it is not None, wherever it is used."""
    made = {}
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):  # named_children has each child once
            if child is None:
                continue
            if child not in made:
                made[child] = swap(child)
            if made[child] is not None:
                setattr(module, name, made[child])
