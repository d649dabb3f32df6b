"""Whether what quantize_ has noted of its calls describes a model as it is now: files have no more than that."""

from torch.nn.utils import parametrize

from quantops.activation import front_of
from quantops.convert import records
from quantops.layers import WEIGHT
from quantops.methods.multibn import MultiBatchNorm, is_batch_norm
from quantops.nn import parameter_name, quantized

NAMED = 4  # so many in a message


def check_recorded(model):
    """ValueError, naming them, where other weights are quantized than the calls chose, or where they would make
    quantizers, and norms of each width, of what is float now."""
    modules, taken, gone, again = dict(model.named_modules(remove_duplicate=False)), set(), [], []
    swapped = {}
    for path, config, chosen in records(model):
        for name, quantizer in _weights(modules, path, config, chosen).items():
            if quantizer is None:
                gone.append(name)
            elif quantizer in taken:
                again.append(name)
            taken.add(quantizer)
        swapped |= _still_float(modules, path, config)
    new = [parameter_name(name, p) for name, _, p in quantized(model) if p not in taken]
    told = [
        (new, "are quantized by no call of this model (of a slice or another part of it, maybe)"),
        (gone, "were quantized and are not any more"),
        (again, "were quantized by one call, made anew, and by another"),
        (list(swapped), "would become quantizers or norms of each width and have been put there since"),
    ]
    wrong = [f"{', '.join(names[:NAMED])}{_more(names)} {text}" for names, text in told if names]
    if wrong:
        raise ValueError(
            f"model: expected one that is as quantops.quantize_ made it, got one of which {'; '.join(wrong)}. Change "
            "a model before quantize_, and call that with the model itself. The weights of this one can be saved by "
            "quantops.save_int"
            + ("" if swapped else ", and all of it by torch.save(model.state_dict()), which quantops.prepare loads")
        )


def _more(names):
    return f" and {len(names) - NAMED} more" if len(names) > NAMED else ""


def _weights(modules, path, config, chosen):
    """{name in the model: its quantizer, None where it has none} of what a call quantized, each weight once."""
    found, ids, of_module = {}, {}, []
    for name in chosen:
        full = f"{path}.{name}".strip(".")
        module, parameter = modules.get(full), WEIGHT
        if module is None:
            module, parameter = modules.get(full.rpartition(".")[0]), full.rpartition(".")[2]
        owner = _owner(module, parameter)
        w = owner.original if owner is not None else getattr(module, parameter, None)
        of_module.append((module, id(w)))
        if w is None or id(w) not in ids.values():
            label = f"{full}.{WEIGHT}".removeprefix(".") if parameter == WEIGHT else full
            found[label], ids[label] = owner and owner[0].source, id(w)
    ends = [of_module[i][0] for i, policy in ((0, config.first), (-1, config.last)) if policy == "skip"]
    skipped = {w for module, w in of_module if any(module is end for end in ends)}
    return {label: quantizer for label, quantizer in found.items() if ids[label] not in skipped}


def _owner(module, parameter):
    """The ParametrizationList of a weight that quantize_ chose, or None."""
    if module is None or not parametrize.is_parametrized(module, parameter):
        return None
    owner = module.parametrizations[parameter]
    return owner if hasattr(owner[0], "source") else None


def _still_float(modules, path, config):
    """{name: module} of what a call would change, as it did all of its kind."""
    relus = getattr(config, "act_bits", None) is not None and config.act == "relu"
    norms = getattr(config, "batch_norm", False)
    kept = {m.norm for m in modules.values() if isinstance(m, MultiBatchNorm)}
    inside = f"{path}.".removeprefix(".")
    return {
        name: m
        for name, m in modules.items()
        if name.startswith(inside) and name != path and m not in kept
        if relus and front_of(m) or norms and is_batch_norm(m)
    }
