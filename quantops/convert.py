"""quantize_ puts a method's quantizers on the weights of a model, unquantize_ takes them off. What the method is, its
config says."""

import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from quantops.checks import FLOATS
from quantops.classes import fit_class, own_class, own_lists, plain_again
from quantops.coverage import warn_of_the_rest
from quantops.layers import ROWS, WEIGHT, adapters, check_rows, has_matrices, is_cast, matrices, rows_of, to_rows
from quantops.nn import WeightGroup, check_only, quantized, trackable
from quantops.owners import check_module, owners
from quantops.reference.uniform import MAX_BITS
from quantops.tied import SharedWeight, ends, join_transformers, leave_transformers
from quantops.types import ModelT
from quantops.version import __version__

FUSE = ("model", "layer")
POLICIES = ("quantize", "skip")
RECORD = "_quantize_calls"  # the attribute of a model that says how it was quantized, see config_json.py
TIED = ("both", "chosen")
# Parameters that hooks of torch compute a weight from, and what takes them off.
REPLACED = {"weight_g": "torch.nn.utils.remove_weight_norm", "weight_orig": "torch.nn.utils.remove_spectral_norm"}
PRUNED = "torch.nn.utils.prune.remove(layer, 'weight')"


def check_int(name, value, low, high):
    """``value`` where it is an integer low..high; ValueError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: expected an integer {low}..{high}, got {value!r}")
    return value


def check_choice(name, value, allowed):
    """``value`` where it is one of ``allowed``; ValueError naming it otherwise."""
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """What the configs of all methods share; subclasses say how a layer's quantizer is made.

    fuse: "model", all layers in one call at the start of each forward of the root, or "layer"; see quantops/nn.py.
    cache: keep q while no weight and no bits change (gradient accumulation).
    first, last: for the first and the last of the layers chosen, in module order, with all their weights (an LSTM has
        several): "quantize" as the others, "skip", or a number of bits that stays fixed.
    tied: for a Parameter that several layers share (an embedding and the head of a language model): "both", all of them
        see the same quantized weight, or "chosen", only those that were chosen; the others keep the float one.
    overrides: {pattern (fnmatch) of layer names, or of ``layer.parameter``: {setting: value}}; later patterns win, and
        all win over first and last but for "skip". "rows" sets the dims that are rows, see quantops/layers.py.
    """

    fuse: str = "model"
    cache: bool = False
    first: str | int = "quantize"
    last: str | int = "quantize"
    tied: str = TIED[0]
    overrides: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    settings: ClassVar[tuple[str, ...]] = ()  # what an override may set that a quantizer asks for by itself
    fields: ClassVar[tuple[str, ...]] = ()  # fields that an override may set

    def __post_init__(self):
        check_choice("fuse", self.fuse, FUSE)
        check_choice("cache", self.cache, (True, False))
        check_choice("tied", self.tied, TIED)
        for end in ("first", "last"):
            policy = getattr(self, end)
            if isinstance(policy, (str, bool)) or not isinstance(policy, int):
                check_choice(end, policy, POLICIES)
            else:
                check_int(end, policy, 0, MAX_BITS)
        if not isinstance(self.overrides, dict):
            raise ValueError(f"overrides: expected a dict, got {type(self.overrides).__name__}")
        for pattern, values in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(values, dict):
                raise ValueError(
                    f"overrides[{pattern!r}]: expected a dict of settings under a pattern of layer names, "
                    f"got {values!r}"
                )
            for key in values:
                check_choice(f"overrides[{pattern!r}]", key, (*self.settings, *self.fields, "rows"))

    def of_layer(self, name: str, settings: dict[str, Any], **values: Any) -> Any:
        """The config with the fields that ``settings`` of a layer say, and with ``values``."""
        own = {key: value for key, value in settings.items() if key in self.fields}
        if not own:
            return self
        try:
            return dataclasses.replace(self, overrides={}, **values, **own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def fixed(self, bits: int) -> dict[str, Any]:
        """Settings of a layer whose bits stay at ``bits``."""
        raise NotImplementedError

    def quantizer(self, name: str, weight: torch.Tensor, settings: dict[str, Any]) -> Any:
        """The WeightQuantizer of layer ``name``, whose weight has its rows in dim 0. Raises ValueError naming what is
        wrong."""
        raise NotImplementedError

    def prepare(self, model: torch.nn.Module, layers: dict[str, Any]) -> None:
        """Changes what the method needs besides weights; ``layers``: {name: (module, settings)} of those whose weights
        are quantized. ValueError, with the model untouched, where it cannot."""


def quantize_(
    model: ModelT, config: "QuantConfig", filter_fn: Callable[[str, torch.nn.Module], Any] | Sequence[str] | None = None
) -> ModelT:
    """Makes a model train on quantized weights, in place, and returns it.

    From then on ``layer.weight`` is q for each layer chosen, and ``layer.parametrizations.weight.original`` is the
    float weight: the same Parameter object as before, so that optimizers made earlier stay valid. Parameters keep their
    order, by which states of optimizers are loaded, except where a layer has others between those that are quantized,
    as LSTMs of several layers do. Precision lives in integer buffers of the state dict; changing it recompiles nothing.
    Call before torch.compile or DDP.

    A quantized weight has the name of its layer, where it is the layer's ``weight``, or ``layer.parameter``, as in
    ``lstm.weight_ih_l0``: in overrides, reports and errors.

    Args:
        config: MSQConfig, TruncQuantConfig or CPQConfig.
        filter_fn: (name, module) -> True, for the weight matrices of a layer by the table of quantops/layers.py, False,
            or a tuple of names of parameters; or a list of patterns (fnmatch) of ``layer.parameter``, for any
            floating-point parameters. Default :func:`quantops.has_matrices`: linear and convolutional layers,
            attention, recurrent layers, experts, but none of adapters (LoRA).

    With config.fuse = "model" the forward of ``model`` itself, not of a part of it, does the work for all layers. See
    quantops/nn.py for memory, checkpointing, autocast, compiling and distributed training. fuse = "layer" quantizes all
    experts of a layer, and all weights of an LSTM, whenever one is read.

    A Parameter that several layers share is quantized once, see ``tied`` of the config.

    Warns where less than 90 % of the weights in matrices are quantized; :func:`quantops.bit_report` says what is left;
    and where the order of parameters changes unnoticed by torch, since all shapes are the same.

    Raises ValueError, with the model untouched, for a filter or an override that matches nothing, a chosen module
    without a floating-point weight, a weight that already has a parametrization, a weight on the meta device, and
    settings out of range. TypeError for what is not a config.
    """
    if not isinstance(config, QuantConfig):
        raise TypeError(
            "config: expected MSQConfig, TruncQuantConfig, CPQConfig or another config of quantops, got "
            f"{type(config).__name__}"
        )
    check_module(model)
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: expected a model that is not compiled yet: quantize_ first, then torch.compile")
    if filter_fn is None:
        skipped = adapters(model)
        places = _chosen(model, lambda name, module: module not in skipped and has_matrices(name, module))
    else:
        places = _chosen(model, filter_fn)
    chosen = dict(places)
    shared = ends(model, places, config.tied == "both", _check_weight)
    settings = _settings(chosen, places, config)
    made = {}
    for name, values in settings.items():
        module, parameter = places[name]
        label, w = name or "model", module._parameters[parameter]
        rows = check_rows(label, values.get("rows", rows_of(module, parameter)), w)
        by_row = values.get("per_row", getattr(config, "per_row", False)) or getattr(config, "gate_rows", None)
        rows = rows if by_row else ROWS
        made[name] = config.quantizer(label, to_rows(w, rows), values)
        made[name].row_dims, made[name].parameter, made[name].layer = rows, parameter, label
        made[name].cast = all(is_cast(m) for m, _ in (places[name], *shared.get(name, ())))
        made[name].recipe, made[name].shape = _recipe(config, values, _full_name(name, parameter)), w.shape
        if config.tied == "chosen":
            paths = {m: path for path, m in model.named_modules()}
            made[name].recipe["shared"] = [_full(paths[m], p) for m, p in shared.get(name, ())]
    before = list(model.parameters())
    config.prepare(model, {name: (places[name][0], settings[name]) for name in made if places[name][1] == WEIGHT})

    layers = []
    for name, quantizer in made.items():
        module, parameter = places[name]
        layers.append((_register(module, parameter, quantizer), quantizer))
        for module, parameter in shared.get(name, ()):
            _register(module, parameter, SharedWeight(quantizer))
    if config.fuse == "model":
        # Lightning calls training_step, which may call the layers without the forward of the model.
        group = WeightGroup(layers, True, config.cache, lazy=hasattr(model, "training_step"))
        for _, quantizer in layers:
            quantizer.group = group
        group.root = model
        model.register_forward_pre_hook(group)
        model.register_forward_hook(group.end, always_call=True)
    else:
        for layer in layers:
            layer[1].group = WeightGroup([layer], False, config.cache)
    model.__dict__.setdefault(RECORD, []).append((config, tuple(chosen)))
    join_transformers(model)
    warn_of_the_rest(model)
    _warn_of_order(before, model)
    return model


def _warn_of_order(before, model):
    """Where the states of an optimizer that was made before would go to other parameters without an error: torch
    compares their number, and its optimizers fail where shapes differ."""
    after = list(model.named_parameters())
    moved = [(name, p, old) for (name, p), old in zip(after, before) if p is not old]
    if moved and len(after) == len(before) and all(p.shape == old.shape for _, p, old in moved):
        warnings.warn(
            f"the order of parameters has changed, from {moved[0][0]} on: the state of an optimizer made before "
            "quantize_ does not fit one that is made after it, which torch does not notice",
            stacklevel=3,
        )


def records(model):
    """[(name of the module that quantize_ was called with, its config, names of the weights that its filter chose)]"""
    return [(name, *record) for name, m in model.named_modules() for record in m.__dict__.get(RECORD, ())]


def _register(module, parameter, quantizer):
    """Puts a quantizer, or one that is shared, on a parameter; returns its ParametrizationList."""
    quantizer.place = list(module._parameters).index(parameter)
    for place in sorted(owner[0].place for owner in own_lists(module)):  # those have left their places
        quantizer.place += place <= quantizer.place
    parametrize.register_parametrization(module, parameter, quantizer, unsafe=True)
    fit_class(module, parameter, quantizer)
    return module.parametrizations[parameter]


HOW = ("fuse", "cache")  # fields that say how and not what is computed


def _recipe(config, settings, name):
    """What makes the same quantizer again, fit for JSON: of the weight of a full name."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in HOW}
    fields.update(first="quantize", last="quantize", overrides={})
    return {
        "quantops": __version__,
        "config": {"class": type(config).__name__, **fields},
        "settings": dict(settings),
        "name": name,
    }


def unquantize_(model: ModelT) -> ModelT:
    """Takes the quantizers off again, in place, and returns the model, whose ``layer.weight`` is the float weight then.

    It is the same Parameter as before, so optimizers stay valid, and another method can go on at the bits that one has
    found. Quantized activations stay. Call before torch.compile, DDP or FSDP, as :func:`quantize_`.

    Raises ValueError, with the model untouched, for a model without quantizers, compiled, in DDP or with weights
    sharded by FSDP; for a part of the model that was given to ``quantize_`` with fuse = "model", and a copy of such a
    part; for a weight that has other parametrizations too; and for a model with a batch norm per width
    (:func:`quantops.plain_model` makes one of it that has none).
    """
    layers = quantized(model)
    if not layers:
        raise ValueError("model: expected a model with quantizers, found none")
    if any(hasattr(m, "_orig_mod") or isinstance(m, DistributedDataParallel) for m in model.modules()):
        raise ValueError("model: expected the model itself, got what torch.compile or DDP made of it")
    groups = {id(group) for _, _, _, group in _group_hooks(model)}
    for name, owner, quantizer in layers:
        if quantizer.group.whole and id(quantizer.group) not in groups:
            raise ValueError(
                f"model: {name or 'it'} is quantized with the whole that quantize_ was called with; expected that model"
            )
        check_only(name, owner)
        if not trackable(owner.original):
            raise ValueError(f"{name or 'model'}: expected a plain weight, got a {type(owner.original).__name__}")
    for kind in {type(quantizer) for _, _, quantizer in layers}:
        kind.check_removable(model)
    remove_quantizers(model, leave_quantized=False)
    return model


def remove_quantizers(model, leave_quantized):
    """Makes weights plain Parameters, with the values of q or the float ones, in their old places among the others."""
    layers = sorted(owners(model), key=lambda entry: entry[2][0].place)
    if leave_quantized:  # in Parameters of their own: others may share those of the layers, and are not quantized
        made = {}  # by the quantizer and the weight: torch may have untied layers that shared theirs
        weights = [owner.original for _, _, owner in layers]
        for (_, _, owner), w in zip(layers, weights):
            q = torch.empty_like(w).copy_(owner().detach())
            made.setdefault((owner[0].source, id(w)), torch.nn.Parameter(q, w.requires_grad))
        for (_, _, owner), w in zip(layers, weights):
            owner.original = made[owner[0].source, id(w)]
    for path, parameter, owner in layers:
        layer = model.get_submodule(path)
        own_class(layer)
        parametrize.remove_parametrizations(layer, parameter, leave_parametrized=False)
        weight, parameters = layer._parameters.pop(parameter), list(layer._parameters.items())
        parameters.insert(owner[0].place, (parameter, weight))
        layer._parameters.clear()
        layer._parameters.update(parameters)
        plain_again(layer)
    for module in model.modules():
        module.__dict__.pop(RECORD, None)
    leave_transformers(model)


def _group_hooks(model):
    """[(module, its dictionary of hooks, key, WeightGroup)]"""
    return [
        (module, hooks, key, group)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if isinstance(group := getattr(hook, "__self__", hook), WeightGroup)
    ]


def _chosen(model, filter_fn):
    """{name: (module, parameter)} of the weights that a filter chooses, in the order of the model."""
    if isinstance(filter_fn, (list, tuple)):
        named = [
            (name, module, parameter)
            for name, module in model.named_modules()
            for parameter, p in module._parameters.items()
            if p is not None and any(fnmatch.fnmatchcase(_full(name, parameter), pattern) for pattern in filter_fn)
        ]
    elif callable(filter_fn):
        named = []
        for name, module in model.named_modules():
            found = filter_fn(name, module)
            if isinstance(found, (list, tuple)):
                named += [(name, module, parameter) for parameter in found]
            elif found:
                named += [(name, module, parameter) for parameter in matrices(module)]
    else:
        raise TypeError(
            f"filter_fn: expected a function of (name, module), or a list of patterns of names of parameters, got "
            f"{type(filter_fn).__name__}"
        )
    if not named:
        raise ValueError(f"filter_fn: matches none of the modules of {type(model).__name__}")
    return {name if p == WEIGHT else _full(name, p): (module, p) for name, module, p in named}


def _full_name(name, parameter):
    return _full(name, WEIGHT) if parameter == WEIGHT else name


def _full(name, parameter):
    return f"{name}.{parameter}".removeprefix(".")


def _check_weight(label, module, parameter):
    """ValueError for a parameter that cannot be quantized."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{label}: expected a layer in Python, got a ScriptModule: quantize_ before torch.jit")
    if parametrize.is_parametrized(module, parameter):
        kinds = ", ".join(type(p).__name__ for p in module.parametrizations[parameter])
        raise ValueError(
            f"{label}: the weight already has a parametrization ({kinds}); expected a plain one: take "
            f"it off by torch.nn.utils.parametrize.remove_parametrizations(layer, {parameter!r})"
        )
    if parameter == WEIGHT:
        for replaced, remove in REPLACED.items():
            if replaced in module._parameters and WEIGHT not in module._parameters:
                raise ValueError(
                    f"{label}: its weight is computed from {replaced} before each forward; expected a "
                    f"plain one: take that off by {remove}(layer), or {PRUNED} where it is pruned"
                )
    if parameter == WEIGHT and isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        if module.max_norm is not None:
            raise ValueError(
                f"{label}: max_norm: expected None, got {module.max_norm}: the forward pass would scale entries of the "
                "quantized weight, off their grid"
            )
        if module.sparse:
            raise ValueError(
                f"{label}: sparse: expected False, got True: gradients go through the quantizer, which takes dense ones"
            )
    w = module._parameters.get(parameter)
    if w is None:
        raise ValueError(
            f"{label}: expected a module with a parameter {parameter!r}, got {type(module).__name__} without one"
        )
    if isinstance(w, torch.nn.parameter.UninitializedParameter) or w.device.type == "meta":
        raise ValueError(f"{label}: expected a weight with values, got one that is not initialized")
    if w.dtype not in FLOATS or w.dim() == 0:
        raise ValueError(
            f"{label}: expected a floating-point weight with at least one dimension, got {w.dtype} of "
            f"shape {tuple(w.shape)}"
        )


def _at_end(module, chosen, places):
    """Names in ``places`` of the weights that were chosen of a layer, be they another's too."""
    own = [m._parameters[p] for m, p in chosen.values() if m is module]
    return [name for name, (m, p) in places.items() if any(m._parameters[p] is w for w in own)]


def _settings(chosen, places, config):
    """{name: settings} of the weights that are quantized, by the policies and the overrides. ``chosen``, ``places``:
    all, and each Parameter once."""
    modules = [module for module, _ in chosen.values()]
    policies = [
        (name, policy)
        for module, policy in ((modules[0], config.first), (modules[-1], config.last))
        for name in _at_end(module, chosen, places)
    ]
    skipped = {name for name, policy in policies if policy == "skip"}
    settings = {name: {} for name in places if name not in skipped}
    if not settings:
        raise ValueError("first, last: skip every layer that filter_fn chose")
    for name, policy in policies:
        if isinstance(policy, int) and name in settings:
            settings[name] = dict(config.fixed(policy))
    for pattern, values in config.overrides.items():
        matched = [
            name
            for name in settings
            if fnmatch.fnmatchcase(name or "model", pattern) or fnmatch.fnmatchcase(_full(name, WEIGHT), pattern)
        ]
        if not matched:
            raise ValueError(
                f"overrides[{pattern!r}]: matches none of the layers {', '.join(name or 'model' for name in settings)}"
            )
        for name in matched:
            settings[name].update(values)
    return settings
