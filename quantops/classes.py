"""What the class of a layer with quantized weights has besides torch's parametrized one: parameters in their old order,
pickling, and for recurrent layers the list of weights that their kernels read.

Each such layer has a class of its own, made by torch.nn.utils.parametrize.
"""

import torch
from torch.nn.utils import parametrize


def fit_class(layer):
    """Makes the class of a layer that has been parametrized fit, once."""
    made = type(layer)
    if "named_modules" not in vars(made):
        made.named_modules, made.__reduce_ex__ = _named_modules, _reduce
        if isinstance(layer, torch.nn.RNNBase):
            made._flat_weights = property(_flat_weights, _ignore)
            made._init_flat_weights = made._update_flat_weights = made.flatten_parameters = _nothing


def own_class(layer):
    """Gives the layer a class of its own: a copied layer shares that of the one it was copied from, and taking
    parametrizations off changes it."""
    made = type(layer)
    members = {k: v for k, v in vars(made).items() if k not in ("__dict__", "__weakref__")}
    layer.__class__ = type(made.__name__, made.__bases__, members)


def plain_again(layer):
    """What is left to do for a layer whose weights are plain again: a recurrent one lists them."""
    if isinstance(layer, torch.nn.RNNBase) and not parametrize.is_parametrized(layer):
        layer._init_flat_weights()


def _named_modules(self, memo=None, prefix="", remove_duplicate=True):
    """named_modules with those that hold the first parameters of the layer in front, so that parameters keep their
    order, by which optimizers know their states."""
    memo = set() if memo is None else memo
    if self in memo:
        return
    front = []
    for name, owner in sorted(
        ((name, owner) for name, owner in self.parametrizations.items() if hasattr(owner[0], "place")),
        key=lambda entry: entry[1][0].place,
    ):
        if owner[0].place != len(front):
            break
        front.append(owner)
        yield f"{prefix}.parametrizations.{name}".removeprefix("."), owner
    for name, module in torch.nn.Module.named_modules(self, memo, prefix, remove_duplicate):
        if not any(module is owner for owner in front):
            yield name, module


# Recurrent layers keep a list of their weights, and on a GPU put them into one buffer. Quantized ones are read anew for
# each forward, and cuDNN copies them into a buffer of its own.


def _flat_weights(self):
    return [getattr(self, name, None) for name in self._flat_weights_names]


def _ignore(self, value):
    pass


def _nothing(self):
    pass


# Pickling, for torch.save(model) and processes that are spawned. torch refuses it: nobody finds the class by its name.


def _reduce(self, protocol):
    made = type(self)
    names = [
        name for name, value in vars(made).items() if name in self.parametrizations and isinstance(value, property)
    ]
    state = {key: value for key, value in self.__dict__.items() if key != "_flat_weight_refs"}  # weak references
    return _made_again, (made.__bases__[0], names), state, None, None, _set_state


def _set_state(layer, state):
    layer.__dict__.update(state)


def _made_again(base, names):
    layer = base.__new__(base)
    parametrize._inject_new_class(layer)
    for name in names:
        parametrize._inject_property(layer, name)
    fit_class(layer)
    return layer
