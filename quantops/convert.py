"""quantize_ puts a method's quantizers on the weights of a model, unquantize_ takes them off. What the method is, its
config says."""

import dataclasses
import fnmatch
from typing import Any, ClassVar

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from quantops.checks import FLOATS
from quantops.coverage import warn_of_the_rest
from quantops.nn import WEIGHT, WeightGroup, check_module, check_only, quantized, trackable
from quantops.reference.uniform import MAX_BITS

FUSE = ("model", "layer")
POLICIES = ("quantize", "skip")
RECORD = "_quantize_calls"  # the attribute of a model that says how it was quantized, see config_json.py
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
    first, last: for the first and the last of the layers chosen, in module order: "quantize" as the others, "skip", or
        a number of bits that stays fixed.
    overrides: {pattern of layer names (fnmatch): {setting: value}}; later patterns win, and all win over first and last
        but for "skip".
    """

    fuse: str = "model"
    cache: bool = False
    first: str | int = "quantize"
    last: str | int = "quantize"
    overrides: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    settings: ClassVar[tuple[str, ...]] = ()  # what an override may set

    def __post_init__(self):
        check_choice("fuse", self.fuse, FUSE)
        check_choice("cache", self.cache, (True, False))
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
                check_choice(f"overrides[{pattern!r}]", key, self.settings)

    def fixed(self, bits):
        """Settings of a layer whose bits stay at ``bits``."""
        raise NotImplementedError

    def quantizer(self, name, weight, settings):
        """The WeightQuantizer of layer ``name``. Raises ValueError naming what is wrong."""
        raise NotImplementedError

    def prepare(self, model, layers):
        """Changes what the method needs besides weights; ``layers``: {name: (module, settings)} of those whose weights
        are quantized. ValueError, with the model untouched, where it cannot."""


def is_linear_or_conv(name, module):
    """The default filter of :func:`quantize_`: Linear and Conv1d, 2d, 3d."""
    return isinstance(module, (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d))


def quantize_(model, config, filter_fn=None):
    """Makes a model train on quantized weights, in place, and returns it.

    From then on ``layer.weight`` is q for each layer chosen, and ``layer.parametrizations.weight.original`` is the
    float weight: the same Parameter object as before, so that optimizers made earlier stay valid. Precision lives in
    integer buffers of the state dict; changing it recompiles nothing. Call before torch.compile or DDP.

    Args:
        config: MSQConfig, TruncQuantConfig or CPQConfig.
        filter_fn: (name, module) -> bool chooses the layers; default :func:`is_linear_or_conv`. Any module with a
            floating-point parameter ``weight`` may be chosen.

    With config.fuse = "model" the forward of ``model`` itself, not of a part of it, does the work for all layers. See
    quantops/nn.py for memory, checkpointing, autocast, compiling and distributed training.

    Warns where less than 90 % of the weights in matrices are quantized; :func:`quantops.bit_report` says what is left.

    Raises ValueError, with the model untouched, for a filter or an override that matches nothing, a chosen module
    without a floating-point weight, a weight that already has a parametrization, one Parameter in two chosen layers
    (choose one), a weight on the meta device, and settings out of range. TypeError for what is not a config.
    """
    if not isinstance(config, QuantConfig):
        raise TypeError(
            "config: expected MSQConfig, TruncQuantConfig, CPQConfig or another config of quantops, got "
            f"{type(config).__name__}"
        )
    check_module(model)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn: expected a function of (name, module), got {type(filter_fn).__name__}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: expected a model that is not compiled yet: quantize_ first, then torch.compile")
    filter_fn = filter_fn or is_linear_or_conv
    modules = {name: m for name, m in model.named_modules() if filter_fn(name, m)}
    if not modules:
        raise ValueError(f"filter_fn: matches none of the modules of {type(model).__name__}")
    _check_weights(modules)
    settings = _settings(list(modules), config)
    made = [
        (name or "model", modules[name], config.quantizer(name or "model", modules[name].weight, values))
        for name, values in settings.items()
    ]
    config.prepare(model, {name: (modules[name], values) for name, values in settings.items()})

    layers = []
    for name, module, quantizer in made:
        quantizer.place, quantizer.layer = list(module._parameters).index(WEIGHT), name
        parametrize.register_parametrization(module, WEIGHT, quantizer, unsafe=True)
        module.register_load_state_dict_pre_hook(_take_float_weight)
        if quantizer.place == 0:
            type(module).named_modules = _weight_first  # a class that register_parametrization made for this module
        layers.append((module.parametrizations[WEIGHT], quantizer))
    if config.fuse == "model":
        # Lightning calls training_step, which may call the layers without the forward of the model.
        group = WeightGroup(layers, True, config.cache, lazy=hasattr(model, "training_step"))
        for _, quantizer in layers:
            quantizer.group = group
        model.register_forward_pre_hook(group)
        model.register_forward_hook(group.end, always_call=True)
    else:
        for layer in layers:
            layer[1].group = WeightGroup([layer], False, config.cache)
    model.__dict__.setdefault(RECORD, []).append((config, tuple(modules)))
    warn_of_the_rest(model)
    return model


def records(model):
    """[(name of the module that quantize_ was called with, its config, the layers that its filter chose)]"""
    return [(name, *record) for name, m in model.named_modules() for record in m.__dict__.get(RECORD, ())]


def _take_float_weight(layer, state_dict, prefix, *_):
    """A state dict of the float network sets the float weight; what is not in it, such as bits, stays as it is."""
    inside = f"{prefix}parametrizations.{WEIGHT}."
    if (
        parametrize.is_parametrized(layer, WEIGHT)
        and prefix + WEIGHT in state_dict
        and (f"{inside}original" not in state_dict)
    ):
        w = state_dict[f"{inside}original"] = state_dict.pop(prefix + WEIGHT)
        quantizer = layer.parametrizations[WEIGHT][0]
        if w.shape == layer.parametrizations[WEIGHT].original.shape:  # else torch says that it is not
            for key, value in quantizer.state_for(w).items():
                state_dict.setdefault(f"{inside}0.{key}", value)


def _weight_first(self, memo=None, prefix="", remove_duplicate=True):
    """named_modules of a layer whose weight was the first of its parameters: what holds the weight comes first, so that
    parameters keep their order, by which optimizers know their states."""
    memo, owner = set() if memo is None else memo, self.parametrizations[WEIGHT]
    if self in memo:
        return
    yield f"{prefix}.parametrizations.{WEIGHT}".removeprefix("."), owner
    for name, module in torch.nn.Module.named_modules(self, memo, prefix, remove_duplicate):
        if module is not owner:
            yield name, module


def unquantize_(model):
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
    for name, _, quantizer in quantized(model):
        layer = model.get_submodule(name)
        _own_class(layer)
        for key, hook in list(layer._load_state_dict_pre_hooks.items()):
            if getattr(hook, "hook", hook) is _take_float_weight:
                del layer._load_state_dict_pre_hooks[key]
        if leave_quantized:  # in a Parameter of its own: others may share that of the layer, and are not quantized
            owner = layer.parametrizations[WEIGHT]
            owner.original = torch.nn.Parameter(owner.original.clone(), owner.original.requires_grad)
        parametrize.remove_parametrizations(layer, WEIGHT, leave_parametrized=leave_quantized)
        weight, parameters = layer._parameters.pop(WEIGHT), list(layer._parameters.items())
        parameters.insert(quantizer.place, (WEIGHT, weight))
        layer._parameters.clear()
        layer._parameters.update(parameters)
        quantizer.slot.clear()
        quantizer.group.clear()
        quantizer.group = None
    for module, hooks, key, _ in _group_hooks(model):
        del hooks[key]
        module._forward_hooks_always_called.pop(key, None)
    for module in model.modules():
        module.__dict__.pop(RECORD, None)


def _group_hooks(model):
    """[(module, its dictionary of hooks, key, WeightGroup)]"""
    return [
        (module, hooks, key, group)
        for module in model.modules()
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
        for key, hook in hooks.items()
        if isinstance(group := getattr(hook, "__self__", hook), WeightGroup)
    ]


def _own_class(layer):
    """A copied layer shares the class that torch made for its parametrizations, which removing them would change."""
    made = type(layer)
    members = {k: v for k, v in vars(made).items() if k not in ("__dict__", "__weakref__")}
    layer.__class__ = type(made.__name__, made.__bases__, members)


def _check_weights(modules):
    owners = {}
    for name, module in modules.items():
        label = name or "model"
        if parametrize.is_parametrized(module, WEIGHT):
            kinds = ", ".join(type(p).__name__ for p in module.parametrizations[WEIGHT])
            raise ValueError(
                f"{label}: the weight already has a parametrization ({kinds}); expected a plain one: take "
                "it off by torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
            )
        for parameter, remove in REPLACED.items():
            if parameter in module._parameters and WEIGHT not in module._parameters:
                raise ValueError(
                    f"{label}: its weight is computed from {parameter} before each forward; expected a "
                    f"plain one: take that off by {remove}(layer), or {PRUNED} where it is pruned"
                )
        w = module._parameters.get(WEIGHT)
        if w is None:
            raise ValueError(
                f"{label}: expected a module with a parameter 'weight', got {type(module).__name__} without one"
            )
        if isinstance(w, torch.nn.parameter.UninitializedParameter) or w.device.type == "meta":
            raise ValueError(f"{label}: expected a weight with values, got one that is not initialized")
        if w.dtype not in FLOATS or w.dim() == 0:
            raise ValueError(
                f"{label}: expected a floating-point weight with at least one dimension, got {w.dtype} of "
                f"shape {tuple(w.shape)}"
            )
        if id(w) in owners:
            raise ValueError(f"{label}: shares its weight with {owners[id(w)]}: let filter_fn choose one of them")
        owners[id(w)] = label


def _settings(names, config):
    """{layer name: settings} of the layers that are quantized, by the policies and the overrides."""
    ends = [(names[0], config.first), (names[-1], config.last)]
    skipped = {name for name, policy in ends if policy == "skip"}
    settings = {name: {} for name in names if name not in skipped}
    if not settings:
        raise ValueError("first, last: skip every layer that filter_fn chose")
    for name, policy in ends:
        if isinstance(policy, int) and name in settings:
            settings[name] = dict(config.fixed(policy))
    for pattern, values in config.overrides.items():
        matched = [name for name in settings if fnmatch.fnmatchcase(name or "model", pattern)]
        if not matched:
            raise ValueError(
                f"overrides[{pattern!r}]: matches none of the layers {', '.join(name or 'model' for name in settings)}"
            )
        for name in matched:
            settings[name].update(values)
    return settings
