"""What ``layer.weight`` of a quantized layer is: a computed tensor, whose in-place writes go to the float weight.

``torch.nn.init.normal_(layer.weight)``, ``layer.weight.data.copy_(w)``, ``layer.weight[0] = 0`` and the like would
otherwise write into a value that is gone with the next forward. They set the float weight, as they would without a
quantizer; what would change its shape, its memory or its type raises.

It holds for the tensor itself, its ``data``, ``view_as`` and what indices give; not for other views, such as
``layer.weight.detach()``, for the ``out`` of an op, and within the forward of a network with fuse="model".

Copies hold the values of q alone: ``copy.deepcopy(layer.weight)``, ``layer.weight.data.clone()``. Of such copies torch
makes Parameters, of the tensor itself it does not.
"""

import torch

_disabled = torch._C._disabled_torch_function_impl
_RESHAPING = (
    "as_strided_",
    "detach_",
    "rename_",
    "resize_",
    "resize_as_",
    "set_",
    "share_memory_",
    "squeeze_",
    "swapaxes_",
    "swapdims_",
    "t_",
    "transpose_",
    "unsqueeze_",
)


class Computed(torch.Tensor):
    """q of a layer, and the float weight that it was computed from, as ``float_weight()``."""

    __torch_function__ = _disabled  # type: ignore[assignment]  # ops on it give plain tensors, at the speed of these

    @property
    def data(self):
        """The values without a graph; writes go to the float weight."""
        original = self.float_weight
        return computed(torch.Tensor.data.__get__(self), lambda: original().detach(), self.layer)

    @data.setter
    def data(self, value):
        w = self.float_weight()
        if isinstance(value, Computed) and value.float_weight().data_ptr() == w.data_ptr():
            return  # the end of ``layer.weight.data += delta``, which has written already
        if not isinstance(value, torch.Tensor) or value.shape != w.shape:
            raise RuntimeError(
                f"{self.layer}: data: expected a tensor of shape {tuple(w.shape)}, got "
                f"{tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__}; to resize a layer "
                "(resize_token_embeddings), take quantops.unquantize_(model), resize, and quantize_ again"
            )
        with torch.no_grad():  # seen by version counters, unlike data
            w.copy_(value)

    def view_as(self, other):
        """A view, whose writes go to the float weight."""
        original = self.float_weight
        return computed(torch.Tensor.view_as(self, other), lambda: original().view_as(other), self.layer)

    def __getitem__(self, index):
        original = self.float_weight
        return computed(torch.Tensor.__getitem__(self, index), lambda: original()[index], self.layer)

    def __reduce_ex__(self, protocol):
        return self.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        return self.detach().clone().requires_grad_(self.requires_grad)


def computed(q, float_weight, name):
    """``q`` itself, as a tensor whose writes go to ``float_weight()``."""
    if type(q) is torch.Tensor:
        q.__class__, q.float_weight, q.layer = Computed, float_weight, name
    return q


def _to_float(method):
    def write(self, *args, **kwargs):
        getattr(self.float_weight(), method)(*args, **kwargs)
        return self

    return write


def _refused(method):
    def write(self, *args, **kwargs):
        raise RuntimeError(
            f"{self.layer}: {method} of a quantized weight: expected it of the float weight, "
            "layer.parametrizations.<parameter>.original"
        )

    return write


_OPERATORS = ("add", "and", "floordiv", "ilshift", "mod", "mul", "or", "pow", "sub", "truediv", "xor")
for _method in [
    *(n for n in dir(torch.Tensor) if n.endswith("_") and not n.startswith("_")),
    *(f"__i{operator}__" for operator in _OPERATORS if hasattr(torch.Tensor, f"__i{operator}__")),
    "__setitem__",
]:
    setattr(Computed, _method, (_refused if _method in _RESHAPING else _to_float)(_method))

PLAIN = (torch.Tensor, torch.nn.Parameter, Computed)  # types of tensors that hold their values themselves
