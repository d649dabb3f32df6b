"""A batch norm for each width of a network: one width's activations are distributed unlike another's."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from quantops import checks
from quantops.per_thread import PerThread, in_backward
from quantops.state import Settings

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # whose forward is F.batch_norm and nothing else
AFFINE, STATISTICS = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")


def refuse_recomputing(part):
    """RuntimeError within the backward pass of a joint_loss, where nothing says which width a checkpointed part had."""
    if not torch.compiler.is_compiling() and part.joint_graph and in_backward():
        raise RuntimeError(
            "a checkpointed forward was computed again in the backward pass of a joint_loss, where its "
            "width is not known: use quantops.joint_step; to train at one width call quantops.set_bits"
        )


class MultiBatchNorm(Settings, _BatchNorm):
    """Batch norms of one layer, of which the entry ``index`` of a buffer says which is used: no width recompiles.

    Parameters ``weight`` and ``bias`` and buffers ``running_mean`` and ``running_var`` are those of BatchNorm in rows,
    (widths, channels); ``num_batches_tracked`` is (widths,), ``index`` 0-dim; all are in the state dict. Made from a
    batch norm, whose values every row starts from and whose Parameter objects stay (with another shape), so that
    optimizers made before their first step stay valid. The rows that are not used get gradients of 0.

    Of SyncBatchNorm and subclasses of batch norms with a forward of their own (timm's BatchNormAct2d, which has the
    activation in it) it computes that forward on the row: ``norm`` is the module that it was made from, which keeps
    whatever else it has, once for all widths.

    torch.optim.swa_utils.update_bn computes the statistics of the width that is selected, and leaves the others.
    """

    is_layer = True
    index: torch.Tensor

    def __init__(self, norm: _BatchNorm, widths: tuple[int, ...]) -> None:
        nn.Module.__init__(self)
        self.kind, self.widths, self.features = type(norm), widths, norm.num_features
        self.eps, self.momentum, self.training = norm.eps, norm.momentum, norm.training
        self.affine, self.track_running_stats = norm.affine, norm.track_running_stats
        for name in AFFINE:
            parameter = getattr(norm, name)
            if parameter is not None:
                parameter.data = self._rows(parameter.data)
                parameter.grad = None
            self.register_parameter(name, parameter)
        for name in STATISTICS:
            buffer = getattr(norm, name)
            self.register_buffer(name, None if buffer is None else self._rows(buffer))
        device = next((t.device for t in (*norm.parameters(), *norm.buffers())), None)
        self.norm: _BatchNorm | None = None if self.kind in PLAIN else _emptied(norm)
        self.joint_graph = False  # as in TruncQuantWeight
        self.given = PerThread()  # the index, while a thread goes through the widths
        self.register_buffer("index", torch.zeros((), dtype=torch.int64, device=device))

        self.counts = {"index": range(len(widths))}
        self.select(0)

    def __getattr__(self, name):
        if name == "num_features":  # the rows are no batch norm that others may replace
            raise AttributeError(
                "a MultiBatchNorm has a row of values for each width and cannot be converted; convert the batch norms "
                "(torch.nn.SyncBatchNorm.convert_sync_batchnorm) before quantops.quantize_"
            )
        return super().__getattr__(name)

    def select(self, place: int) -> None:
        """Selects the width at ``place`` of the network's widths, in place: nothing recompiles."""
        self.write(index=place)

    def settings(self) -> dict[str, Any]:
        return {"method": "truncquant", "widths": list(self.widths)}

    def _rows(self, t):
        return t.detach().expand(len(self.widths), *t.shape).clone()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """BatchNorm of the width that is selected."""
        checks.not_symbolic("x", x)
        refuse_recomputing(self)
        given = self.given.get()
        if given is None and not torch.compiler.is_compiling() and self.versions() != self.noted:
            self.check_written()
        # A copy: autograd keeps it, and the width may change before the backward pass.
        at = (self.index.clone() if given is None else given).reshape(1)
        row: dict[str, Any] = {name: None if t is None else t.index_select(0, at).squeeze(0) for name, t in self._own()}
        y = self._plain(x, row) if self.norm is None else self._of_kind(x, row)
        if self.training and self.track_running_stats:
            with torch.no_grad():
                for name in STATISTICS:
                    getattr(self, name).index_copy_(0, at, row[name].unsqueeze(0))
        return y

    def _own(self):
        return [(name, getattr(self, name)) for name in (*AFFINE, *STATISTICS)]

    def _plain(self, x, row):
        self.kind._check_input_dim(self, x)
        momentum, tracks = self.momentum, row["running_mean"] is not None
        if self.training and tracks:
            row["num_batches_tracked"].add_(1)
            if momentum is None:  # the mean of all batches
                momentum = 1.0 / float(row["num_batches_tracked"])
        batch = self.training or not tracks
        statistics = row["running_mean"], row["running_var"]
        return F.batch_norm(x, *statistics, row["weight"], row["bias"], batch, momentum or 0.0, self.eps)

    def _of_kind(self, x, row):
        """The forward of another kind of batch norm, which updates the statistics in ``row``."""
        if torch.compiler.is_compiling():
            return torch.func.functional_call(self.norm, {k: t for k, t in row.items() if t is not None}, (x,))
        norm = self.norm._replicate_for_data_parallel()  # of its own: threads may share the module
        norm._parameters = {**self.norm._parameters, **{name: row[name] for name in AFFINE}}
        norm._buffers.update({name: row[name] for name in STATISTICS})
        y = norm(x)
        row.update({name: norm._buffers[name] for name in STATISTICS})
        return y

    def reset_running_stats(self) -> None:
        """As BatchNorm's, of the width that is selected."""
        if self.track_running_stats:
            at = self.index.reshape(1)
            for name, value in zip(STATISTICS, (0, 1, 0)):
                getattr(self, name).index_fill_(0, at, value)

    def plain(self, place: int) -> torch.nn.Module:
        """The batch norm of one width, a copy."""
        if self.norm is None:
            norm = self.kind(self.features, self.eps, self.momentum, self.affine, self.track_running_stats)
        else:
            norm = copy.deepcopy(self.norm)
            norm._non_persistent_buffers_set.difference_update(STATISTICS)
        norm.train(self.training)
        for name in AFFINE:
            parameter = getattr(self, name)
            if parameter is not None:
                setattr(norm, name, nn.Parameter(parameter.detach()[place].clone(), parameter.requires_grad))
        for name in STATISTICS:
            buffer = getattr(self, name)
            if buffer is not None:
                setattr(norm, name, buffer[place].clone())
        return norm

    def extra_repr(self) -> str:
        return f"{self.kind.__name__}, {self.features}, widths={self.widths}, eps={self.eps}, momentum={self.momentum}"


def _emptied(norm):
    """A batch norm without its parameters and statistics, which are elsewhere."""
    for name in AFFINE:
        norm._parameters[name] = None
    for name in STATISTICS:
        if norm._buffers[name] is not None:
            norm._buffers[name] = norm._buffers[name].new_empty(0)
            norm._non_persistent_buffers_set.add(name)
    return norm


def is_batch_norm(module):
    """Whether a module of a model that is not quantized yet can have a row per width."""
    return isinstance(module, _BatchNorm) and not isinstance(module, MultiBatchNorm)


def check_norms(model):
    """ValueError, naming the module, for a batch norm that cannot have a row per width."""
    for name, module in model.named_modules():
        if is_batch_norm(module) and is_lazy(next(module.parameters(recurse=False), None)):
            raise ValueError(
                f"{name}: expected a batch norm with values, got {type(module).__name__}, which is not initialized; "
                "batch_norm=False leaves it as it is, shared by all widths"
            )


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
