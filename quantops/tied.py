"""Parameters that several layers share, as the embedding and the head of a language model: quantized once, seen by all.

The quantizer is that of one layer, the first that was chosen; the others have a :class:`SharedWeight`, without state.
Their ``original`` is one Parameter, as before.

Models of transformers tie weights and save them by the names that parameters have. In their state dicts the float
weight is therefore ``layer.weight``, as in the float model, which ``from_pretrained`` loads; what the quantizers keep
stands beside it, and :func:`quantops.prepare` makes the quantized model again.
"""

import torch
from torch.nn.utils import parametrize

from quantops.owners import owners


class SharedWeight(torch.nn.Module):
    """A parametrization original -> q for a weight that another layer shares and quantizes."""

    def __init__(self, quantizer):
        super().__init__()
        self.of = (quantizer,)  # in a tuple: it is no part of this module, and in no state dict twice
        self.place = 0

    @property
    def source(self):
        """The quantizer."""
        return self.of[0]

    def gone(self):
        """The weight is plain again here; the other layer goes on."""

    def quick(self, owner):
        """As of the other layer, where there is no more to this one's weight."""
        return None if self.source.group is None else self.source.quick(owner)

    def forward(self, original):
        """What the other layer has."""
        if self.source.group is None:
            raise RuntimeError(
                f"{self.source.layer}, which shares this weight, is not quantized any more; take this parametrization "
                "off too: torch.nn.utils.parametrize.remove_parametrizations(..., leave_parametrized=False)"
            )
        return self.source(original)

    def right_inverse(self, value):
        """As of the other layer."""
        return self.source.right_inverse(value)

    def extra_repr(self):
        return f"of {self.source.layer}"


def ends(model, places, everywhere, check):
    """{name: [(module, parameter)]} of the layers that share the weight of a name in ``places``, {name: (module,
    parameter)}, in which each weight is left once: those that were chosen, or ``everywhere`` in the model."""
    owner, found = {}, {}
    for name, (module, parameter) in list(places.items()):
        check(name or "model", module, parameter)
        w = module._parameters[parameter]
        first = owner.setdefault(id(w), name)
        if first != name:
            del places[name]
            found.setdefault(first, []).append((module, parameter))
    if everywhere:
        for name, module in model.named_modules():
            for parameter, w in module._parameters.items():
                first = owner.get(id(w)) if w is not None else None
                taken = first is not None and [places[first], *found.get(first, ())]
                if taken and not any(module is m and parameter == n for m, n in taken):
                    check(name or "model", module, parameter)
                    found.setdefault(first, []).append((module, parameter))
    return found


def shared_names(model):
    """{quantizer: names of the parameters of others that have its weight}. ValueError where torch has untied them."""
    layers, found = owners(model), {}
    own = {owner[0]: (path, parameter, owner) for path, parameter, owner in layers}
    for path, parameter, owner in layers:
        source = owner[0].source
        if source is owner[0]:
            continue
        if source in own and owner.original is not own[source][2].original:
            ends = [
                (".".join(filter(None, names)), ".".join(filter(None, (names[0], "parametrizations", names[1]))))
                for names in ((path, parameter), own[source][:2])
            ]
            raise ValueError(
                f"{ends[0][0]}: expected one Parameter for it and {ends[1][0]}, which shared their weight when they "
                "were quantized, got two, as load_state_dict(assign=True) and to_empty() leave them; "
                f"{ends[0][1]}.original = {ends[1][1]}.original makes them one again"
            )
        found.setdefault(source, []).append(f"{path}.{parameter}".removeprefix("."))
    return found


# transformers


class _FloatParameters:
    """``model.get_parameter`` of a model of transformers: the float weight in the place of a quantized one, so that
    ``tie_weights`` finds it."""

    def __init__(self, model):
        self.model = model

    def __call__(self, target):
        path, _, name = target.rpartition(".")
        layer = self.model.get_submodule(path)
        if parametrize.is_parametrized(layer, name):
            return layer.parametrizations[name].original
        return torch.nn.Module.get_parameter(self.model, target)


class _TiedKeys:
    """``model.get_expanded_tied_weights_keys``: what is tied, which transformers looks up by names of parameters."""

    def __init__(self, model):
        self.model = model

    def __call__(self, all_submodels=False):
        return dict(self.model.all_tied_weights_keys)


def _plain_names(module, state, prefix, local_metadata):
    """State dict hook: ``layer.weight`` in the place of ``layer.parametrizations.weight.original``."""
    inside = {
        f"{prefix}{path}.parametrizations.{name}.original".replace("..", "."): f"{prefix}{path}.{name}".replace(
            "..", "."
        )
        for path, name, _ in owners(module)
    }
    if inside:
        items = [(inside.get(key, key), value) for key, value in state.items()]
        state.clear()
        state.update(items)


def _of_transformers(model):
    """The outermost models of transformers in ``model``."""
    found = []
    for name, module in model.named_modules():
        if hasattr(module, "tie_weights") and hasattr(module, "save_pretrained"):
            if not any(name.startswith(f"{outer}.".removeprefix(".")) for outer, _ in found):
                found.append((name, module))
    return [module for _, module in found]


def join_transformers(model):
    """Makes models of transformers tie and save what is quantized."""
    for module in _of_transformers(model):
        if "get_parameter" not in module.__dict__:
            module.get_parameter = _FloatParameters(module)
            module.get_expanded_tied_weights_keys = _TiedKeys(module)
            module.register_state_dict_post_hook(_plain_names)


def leave_transformers(model):
    """Undoes :func:`join_transformers`."""
    for module in _of_transformers(model):
        for name in ("get_parameter", "get_expanded_tied_weights_keys"):
            module.__dict__.pop(name, None)
        for key, hook in list(module._state_dict_hooks.items()):
            if getattr(hook, "hook", hook) is _plain_names or hook is _plain_names:
                del module._state_dict_hooks[key]
