"""How a model was quantized, as JSON: the configs of its quantize_ calls and the layers that these chose.

    {"version": 1, "calls": [{"module": "", "config": {"class": "MSQConfig", "bits": 8}, "chosen": ["conv1", "fc"]}]}

``module`` is the name, within the model, of what :func:`quantops.quantize_` was called with; ``chosen`` are the names,
within that, of the weights that its ``filter_fn`` chose, those included that ``first`` and ``last`` then left out: of
the layer for its ``weight``, or ``layer.parameter``. ``activations``, which older files have not, are all quantizers of
activations, see kept_activations.py: those of methods that :func:`quantops.unquantize_` took off are of no call.
"""

import dataclasses
import glob
import json

from quantops.convert import QuantConfig, quantize_, records
from quantops.kept_activations import described, put_back
from quantops.layers import WEIGHT
from quantops.methods.cpq import CPQConfig
from quantops.methods.msq import MSQConfig
from quantops.methods.truncquant import TruncQuantConfig

VERSION = 1
CONFIGS: dict[str, type[QuantConfig]] = {c.__name__: c for c in (MSQConfig, TruncQuantConfig, CPQConfig)}


def config_to_dict(config):
    """{"class": name, field: value} of a config, fit for JSON. ValueError for a config that is not quantops' own."""
    name = type(config).__name__
    if CONFIGS.get(name) is not type(config):
        raise ValueError(f"config: expected one of {', '.join(CONFIGS)}, which alone can be written, got {name}")
    return {"class": name, **{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}}


def config_from_dict(found):
    """The config of :func:`config_to_dict`, after JSON or not. ValueError for anything else, naming it."""
    name = found.get("class") if isinstance(found, dict) else None
    if not isinstance(name, str) or name not in CONFIGS:
        raise ValueError(f"config: expected one of {', '.join(CONFIGS)}, got {name!r}")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items() if k != "class"}
    try:
        return CONFIGS[name](**settings)
    except TypeError as error:  # names that it has not, and values whose kind it does not look at
        raise ValueError(f"config: {error}") from None


def to_json(model):
    """The JSON text for a quantized model. ValueError where :func:`quantops.quantize_` did not quantize it."""
    calls = [
        {"module": module, "config": config_to_dict(config), "chosen": list(chosen)}
        for module, config, chosen in records(model)
    ]
    if not calls:
        raise ValueError(f"model: expected one that quantops.quantize_ quantized, got {type(model).__name__}")
    return json.dumps({"version": VERSION, "calls": calls, "activations": described(model)})


def parsed(text):
    """[(module, config, chosen)] of such a text. ValueError for anything else."""
    found, calls = _read(text), []
    for call in found["calls"]:
        if not isinstance(call, dict) or call.keys() != {"module", "config", "chosen"}:
            raise ValueError("config: expected calls of module, config and chosen")
        chosen = call["chosen"]
        if not isinstance(call["module"], str) or not isinstance(chosen, list):
            raise ValueError("config: expected names of a module and of layers")
        if not all(isinstance(name, str) for name in chosen):
            raise ValueError("config: expected names of layers")
        calls.append((call["module"], config_from_dict(call["config"]), tuple(chosen)))
    return calls


def _read(text):
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"config: not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("version") != VERSION or type(found.get("calls")) is not list:
        raise ValueError(f"config: expected version {VERSION} with a list of calls")
    if type(found.get("activations", [])) is not list:
        raise ValueError("config: expected a list of activations")
    return found


def quantize_as(model, text, **how):
    """Quantizes a plain model, in place, as the one was that ``text`` is of, and returns it.

    ``how``: fields of the configs, which have these values instead. ValueError, with the model untouched, where it has
    not all of the layers.
    """
    calls = parsed(text)
    modules, own = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for module, _, chosen in calls:
        names = [f"{module}.{name}".strip(".") for name in chosen]
        missing = [n for n in names if f"{n}.{WEIGHT}".removeprefix(".") not in own and n not in own]
        missing += [] if module in modules else [module]
        if missing:
            raise ValueError(f"model: {type(model).__name__} has no {', '.join(missing[:4])}, which was quantized")
    for module, config, chosen in calls:
        weights = dict(modules[module].named_parameters(remove_duplicate=False))
        full = [name if name in weights else f"{name}.{WEIGHT}".removeprefix(".") for name in chosen]
        config = dataclasses.replace(config, **how)
        quantize_(modules[module], config, [glob.escape(name) for name in full])
    put_back(model, _read(text).get("activations", []))
    return model
