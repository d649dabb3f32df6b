"""What the class of a layer with quantized weights has besides torch's parametrized one: parameters in their old order,
pickling, and for recurrent layers the list of weights that their kernels read.

Each such layer has a class of its own, made by torch.nn.utils.parametrize.
"""

import torch
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.parametrize import ParametrizationList

QUANTIZERS = "_quantizers"  # the attribute of a layer with {parameter: its quantizer}


def fit_class(layer, parameter, quantizer):
    """Makes a layer fit, of which a parameter has been parametrized by a quantizer."""
    if QUANTIZERS not in layer.__dict__:
        layer.__dict__[QUANTIZERS] = {}
        layer.register_load_state_dict_pre_hook(take_float_weights)
    layer.__dict__[QUANTIZERS][parameter] = quantizer
    layer.parametrizations[parameter].__class__ = QuantizedList
    if type(layer._parameters) is dict:
        layer.__dict__["_parameters"] = _Parameters(layer._parameters, layer.__dict__[QUANTIZERS])
    _fit(type(layer))
    _read_quickly(type(layer), parameter)


class _Parameters(dict):
    """The parameters of a layer, which says why a quantized one is not among them. torch's deprecated weight_norm and
    spectral_norm, which are hooks, look for it here."""

    def __init__(self, parameters, quantizers):
        super().__init__(parameters)
        self.quantizers = quantizers

    def __missing__(self, name):
        if name in self.quantizers:
            raise ValueError(_refusal(self.quantizers[name].source.layer, "norms"))
        raise KeyError(name)

    def __delitem__(self, name):
        if name not in self:
            self[name]  # which raises
        super().__delitem__(name)


class QuantizedList(ParametrizationList):
    """Of a weight that has a quantizer. Others may follow, such as a mask, but not those of torch that set the size or
    the directions of a weight, which what is on a grid does not keep."""

    def append(self, module):
        if type(module).__module__ == parametrizations.__name__:
            raise ValueError(_refusal(self[0].source.layer, type(module).__name__.strip("_")))
        return super().append(module)


def _refusal(layer, what):
    return (
        f"{layer}: the weight is quantized; expected {what} on a plain one: take quantops.unquantize_(model), apply it "
        "and make the weight plain (parametrize.remove_parametrizations, prune.remove) before quantize_; a mask can "
        "follow a quantizer: parametrize.register_parametrization(layer, 'weight', a module that multiplies by it)"
    )


def own_lists(layer):
    """The ParametrizationLists of a layer that quantize_ made."""
    return [owner for owner in getattr(layer, "parametrizations", {}).values() if hasattr(owner[0], "source")]


def _fit(made):
    if "named_modules" not in vars(made):
        made.named_modules, made.__reduce_ex__, made.register_parameter = _named_modules, _reduce, _register_parameter
        if issubclass(made, torch.nn.RNNBase):
            made._flat_weights = property(_flat_weights, _ignore)
            made._init_flat_weights = made._update_flat_weights = made.flatten_parameters = _nothing


def _read_quickly(made, parameter):
    """Has reads of a parameter ask its quantizer first, which torch's way to it takes several times as long for."""
    read, write = made.__dict__[parameter].fget, made.__dict__[parameter].fset

    def quickly(self):
        if torch.compiler.is_compiling() or parametrize._cache_enabled:
            return read(self)
        owner = self.__dict__["_modules"]["parametrizations"]._modules[parameter]
        found = owner._modules["0"].quick(owner)
        return read(self) if found is None else found

    setattr(made, parameter, property(quickly, write))


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


def take_float_weights(layer, state_dict, prefix, *_):
    """Load hook: a state dict of the float network sets the float weights; what is not in it, such as bits, stays."""
    for parameter, owner in layer.parametrizations.items():
        inside, quantizer = f"{prefix}parametrizations.{parameter}.", owner[0]
        if hasattr(quantizer, "source") and prefix + parameter in state_dict and f"{inside}original" not in state_dict:
            w = state_dict[f"{inside}original"] = state_dict.pop(prefix + parameter)
            # A weight of another shape: torch says that it is one. A state beside it is that of this very weight.
            known = f"{inside}0._extra_state" in state_dict
            if quantizer.source is quantizer and w.shape == owner.original.shape and not known:
                for key, value in quantizer.state_for(quantizer.rows(w)).items():
                    state_dict.setdefault(f"{inside}0.{key}", value)


class _Gone:
    """In the place of a quantizer where there is none."""

    @staticmethod
    def gone():
        pass


def _register_parameter(self, name, param):
    """``layer.weight = Parameter`` sets the float weight, which stays the Parameter that it is."""
    base, _, end = name.rpartition("_")
    if end in ("orig", "g") and base in self.__dict__.get(QUANTIZERS, {}):
        raise ValueError(
            _refusal(self.__dict__[QUANTIZERS][base].source.layer, "pruning" if end == "orig" else "norms")
        )
    owner = self.parametrizations[name] if name in self.__dict__["_modules"].get("parametrizations", {}) else None
    if owner is None or param is None:
        torch.nn.Module.register_parameter(self, name, param)
        self.__dict__.get(QUANTIZERS, {}).pop(name, _Gone).gone()  # as torch's remove_parametrizations does it
        if not self.__dict__.get(QUANTIZERS, True):
            del self.__dict__[QUANTIZERS]
            self.__dict__["_parameters"] = dict(self._parameters)
            hooks = self._load_state_dict_pre_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is take_float_weights]:
                del hooks[key]
    elif param is not owner.original:
        owner.right_inverse(param.detach().clone())


def _named_modules(self, memo=None, prefix="", remove_duplicate=True):
    """named_modules with those that hold the first parameters of the layer in front, and the others behind its own, so
    that parameters keep their order, by which optimizers know their states."""
    memo = set() if memo is None else memo
    if self in memo:
        return
    owners = sorted(
        (
            (f"{prefix}.parametrizations.{name}".removeprefix("."), owner)
            for name, owner in self.parametrizations.items()
            if hasattr(owner[0], "place")
        ),
        key=lambda entry: entry[1][0].place,
    )
    count = next((i for i, (_, owner) in enumerate(owners) if owner[0].place != i), len(owners))
    yield from owners[:count]
    for name, module in torch.nn.Module.named_modules(self, memo, prefix, remove_duplicate):
        if not any(module is owner for _, owner in owners):
            yield name, module
        if module is self:
            yield from owners[count:]


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
        (name, hasattr(self.parametrizations[name][0], "source"))
        for name, value in vars(made).items()
        if name in self.parametrizations and isinstance(value, property)
    ]
    state = {key: value for key, value in self.__dict__.items() if key != "_flat_weight_refs"}  # weak references
    return _made_again, (made.__bases__[0], names), state, None, None, _set_state


def _set_state(layer, state):
    layer.__dict__.update(state)


def _made_again(base, names):
    layer = base.__new__(base)
    parametrize._inject_new_class(layer)
    for name, ours in names:
        parametrize._inject_property(layer, name)
        if ours:
            _read_quickly(type(layer), name)
    _fit(type(layer))
    return layer
