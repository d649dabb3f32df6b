"""The recipe of each method of ``python -m bench train``: its paper, its settings, and where they leave the paper."""

import dataclasses
from collections.abc import Callable
from typing import Any

from bench import models
from bench.training import methods
from quantops.demo.resnet20 import ResNet20

COMMON = {"batch": 128, "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}  # SGD, cosine schedule to 0
NETWORKS = {"resnet20": ResNet20, "vit": models.small_vit}
EVERYWHERE = (
    "JPEG images in the place of the original ones; finetuned from --init, for --epochs; activations stay "
    "float unless named; all layers, first and last too, are quantized; SGD, cosine schedule, lr 0.02 unless named"
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """method: its class in methods.py, called with ``settings``; deviations: from ``paper``, and EVERYWHERE;
    network: of NETWORKS."""

    method: Callable
    settings: dict[str, Any]
    paper: str
    deviations: str
    claims: str = ""  # figures of the paper
    common: dict[str, Any] = dataclasses.field(default_factory=dict)  # in the place of COMMON, and an "optimizer"
    network: str = "resnet20"


_MSQ = dict(
    bits=8,
    k=1,
    target=16.0,
    grid="dyadic",
    penalty="loss",
    hessian=True,
    scale=2.8,  # times mean|w|; "absmax": max|w|, the paper's
    scale_grad=False,  # the scale is a constant
    penalty_unit="step",  # of the penalty; "code": a plain sum of |B|
    min_bits=2,  # the dyadic grid of 1 bit is {-s, 0}: layers that came to it were lost
    threshold=0.5,  # alpha, the fraction of nonzero LSBs below which a layer loses bits
    strength=2e-3,  # lambda
    prune=0.4,  # part of the steps that is to do for dropping bits,
    decisions=8,  # and the decisions in it; where they do not reach the target, more follow
    samples=2,  # of the Hutchinson estimate
    sample_size=64,  # images for it
    fall_back=True,  # a layer that cannot lose two bits may lose one
    nearest=None,  # or a number f: at the bits found, the nearest rule with a scale of f mean|w|
)
_MSQ_PAPER = "MSQ, arXiv 2507.22349"
_MSQ_GRID = (
    "a scale of 2.8 mean|w| for max|w|, which at 2 bits is worse by 5 points; dyadic grid (exact zero) and at "
    "least 2 bits, since at 1 bit that grid has no positive value; "
)
_MSQ_DEVIATIONS = (
    _MSQ_GRID + "lambda (5e-5 there) and threshold larger, since decisions are a fraction of an epoch "
    "apart, and at 8 bits the noise of the gradients alone keeps LSBs busy; the Hessian from 2 samples "
    "of 64 images"
)

# Quickly down: where all layers end at 2 bits, what counts are the steps that are left then.
_NEAREST = {"hessian": False, "threshold": 0.55, "prune": 0.2, "nearest": 1.87}

# The default of MSQController, the same for all networks.
_RELATIVE = {"penalty": "decoupled", "penalty_unit": "gradient", "strength": 0.3}

# The sign grid counts bits as BSQ does: n of magnitude beside a sign. The scales have the least squared error of normal
# weights at 1 and at 2 bits.
_SIGN = {"grid": "sign", "min_bits": 1, "scale": 3.07}

_PAPER = {  # as its text has it: codes over 2^n - 1, and a plain sum of |B|
    "grid": "full",
    "scale": "absmax",
    "penalty_unit": "code",
    "min_bits": 1,
    "threshold": 0.3,
    "strength": 5e-5,
    "fall_back": False,
}

# 2 bits fixed, in details that public code and this library have decided differently.
_FIXED = _MSQ | {"bits": 2, "k": 0, "target": None}
_ROUND_CLAMP = "round-clamp rule, constant bits"

WIDTHS = (8, 4, 2, 1)
_TRUNCATED = dict(
    widths=WIDTHS,
    rule="floor",
    joint=True,
    companding=None,
    batch_norm=True,
    distill=0.0,
    scale="absmax",  # or a number f, f mean|w|
)
_ALONE = _TRUNCATED | {"joint": False, "batch_norm": False}  # trained at its widest width
_TWO = _ALONE | {"widths": (2,)}
_TANH = _TWO | {"companding": "tanh", "out_scale": "absmean", "slope": "ste"}
_EXACT = {"slope": "exact", "scale_grad": True}
_FLOOR = "the floor rule, constant bits"
_PUBLIC = "its gradients: the slope mean|w| / tanh(max|w|), and through both scales"
_ANY = "Any-Precision networks, arXiv 1911.07346, which TruncQuant builds on"
# Of TruncQuantConfig.paper(). 16 bits stand for the float weights, which are trained along and teach.
_TRUNCATION = "TruncQuant, arXiv 2506.11431"
_TRUNCQUANT_PAPER = _TRUNCATED | dict(
    widths=(16, *WIDTHS),
    companding="tanh",
    out_scale="absmean",
    slope="exact",
    scale_grad=True,
    first="skip",
    last="skip",
    shortcuts=False,  # they stay float
    distill=1.0,
    distill_from="wider",
)
_TRUNCQUANT_PAPER_DEVIATIONS = (
    "TruncQuantConfig.paper(), details of the public code that it builds on: first, last and shortcut layers are "
    "float; 16 bits stand for the float weights that teach 8 bits, which teach 4, and so on, by soft cross entropy; "
    "the mean of the losses of all widths; not the pre-activation ResNet-20"
)
_BITS = dict(
    bits=4,
    dropbits=None,
    search=0.6,  # part of the steps in which gates are drawn, where there are any
    strength=0.0,  # of the penalty on gates
    gate_rate=10.0,  # their learning rate, as a multiple of that of the weights
)

RECIPES = {
    "float": Recipe(methods.Float, {}, "-", "none"),
    "msq": Recipe(
        methods.MSQ,
        _MSQ,
        _MSQ_PAPER,
        _MSQ_DEVIATIONS,
        claims="up to 8.00x fewer trainable parameters and up to 86 % less training time than bit-level training",
    ),
    "msq-no-hessian": Recipe(methods.MSQ, _MSQ | {"hessian": False}, _MSQ_PAPER, _MSQ_DEVIATIONS + "; k = 1 always"),
    "msq-absmax": Recipe(methods.MSQ, _MSQ | {"scale": "absmax"}, _MSQ_PAPER, _MSQ_DEVIATIONS + "; here max|w|"),
    "msq-full-grid": Recipe(
        methods.MSQ,
        _MSQ | {"grid": "full", "min_bits": 1},
        _MSQ_PAPER,
        _MSQ_DEVIATIONS + "; here the full grid, down to 1 bit",
    ),
    "msq-nearest": Recipe(
        methods.MSQ,
        _MSQ | _NEAREST,
        _MSQ_PAPER,
        _MSQ_GRID + "k = 1 always, without the Hessian; lambda larger, and a threshold of 0.55, as "
        "decisions end after a fifth of the steps; once the target is reached, training goes on with "
        "the nearest rule at the bits found, whose 2-bit levels are symmetric: -3, -1, 1 and 3 "
        "thirds of 1.87 mean|w|",
    ),
    "msq-decoupled": Recipe(
        methods.MSQ,
        _MSQ | {"penalty": "decoupled"},
        _MSQ_PAPER,
        _MSQ_DEVIATIONS + "; the penalty's gradient is added after the backward pass",
    ),
    "msq-paper": Recipe(
        methods.MSQ,
        _MSQ | _PAPER,
        _MSQ_PAPER,
        "MSQConfig.paper(), and the paper's lambda and threshold; decisions are a fraction of an epoch apart; the "
        "Hessian from 2 samples of 64 images",
    ),
    "msq-relative": Recipe(
        methods.MSQ,
        _MSQ | _RELATIVE,
        _MSQ_PAPER,
        _MSQ_DEVIATIONS + "; lambda is a part of the task's gradient in each layer, the default of MSQController",
    ),
    "msq-sign": Recipe(
        methods.MSQ,
        _MSQ | _SIGN,
        _MSQ_PAPER,
        _MSQ_DEVIATIONS + "; here the sign grid, whose bits do not count the sign, down to 1 bit, with 3.07 mean|w|",
    ),
    "fixed-2-bits": Recipe(
        methods.MSQ, _FIXED, _ROUND_CLAMP, "no penalty, no controller: what MSQ's choice of bits is compared with"
    ),
    "qat": Recipe(
        methods.Truncated,
        _ALONE | {"rule": "nearest"},
        "DoReFa's rule, arXiv 1606.06160",
        "no tanh; trained at 8 bits, then truncated",
    ),
    "truncquant": Recipe(
        methods.Truncated,
        _TRUNCATED | {"scale": 2.5},
        _TRUNCATION,
        "scale 2.5 mean|w| without tanh; the mean of the losses of all widths, so that lr means the same",
        claims="86.0 % at 8 bits; at 2 bits 57.5 % of ordinary training truncated, 85.8 % of this",
    ),
    **{  # what its default was chosen from
        f"truncquant-{name}": Recipe(
            methods.Truncated,
            _TRUNCATED | settings,
            _TRUNCATION,
            f"{text}; the mean of the losses of all widths, so that lr means the same",
        )
        for name, settings, text in (
            ("absmax", {}, "scale max|w| without tanh"),
            ("gradient", {"scale_grad": True}, "scale max|w| without tanh, and the gradient through it"),
            ("tanh", _EXACT | {"companding": "tanh", "out_scale": "absmean"}, "tanh, mean|w|, " + _PUBLIC),
        )
    },
    **{
        f"separate-{m}": Recipe(
            methods.Truncated, _ALONE | {"widths": (m,)}, _FLOOR, "one network for this width alone"
        )
        for m in WIDTHS
    },
    "bsq": Recipe(
        methods.BSQ,
        dict(
            bits=8,
            strength=5e-3,  # alpha
            adjustments=6,  # of the precisions; the paper: every 50 of 350 epochs
            search=0.7,  # part of the steps before finetuning at fixed bits
        ),
        "BSQ, arXiv 2102.10462",
        "biases stay float; no weight decay of the scale; lr 0.1, as in its public code; finetuned with a learned "
        "step, on weights in the size that they had at first",
        common={"lr": 0.1},
    ),
    "csq": Recipe(
        methods.CSQ,
        dict(
            bits=8,
            target=2.0,
            strength=0.01,  # lambda of the budget
            hottest=200.0,  # temperature at the end, from 1
            search=0.7,  # part of the steps in which bits are chosen
        ),
        "CSQ, arXiv 2212.02770",
        "starts at the bits of the given weights; planes that are not chosen are dropped at 70 % of the steps, and the "
        "temperature of the others goes on rising instead of starting again; lr 0.1",
        common={"lr": 0.1},
    ),
    "truncquant-paper": Recipe(methods.Truncated, _TRUNCQUANT_PAPER, _TRUNCATION, _TRUNCQUANT_PAPER_DEVIATIONS),
    "cpq-paper": Recipe(
        methods.CPQ,
        _BITS | {"grad": "winner", "sigma": 1 / 3, "start": "range"},
        "CPQ, arXiv 2109.02100",
        "CPQConfig.paper(); weights only; float weights and their alpha at one lr",
    ),
    "cpq": Recipe(methods.CPQ, _BITS, "CPQ, arXiv 2109.02100", "weights only; float weights and their alpha at one lr"),
    "dropbits": Recipe(
        methods.CPQ,
        _BITS | {"dropbits": "learned", "strength": 3e-2},
        "DropBits, arXiv 2109.02100",
        "weights only; float weights and their alpha at one lr, gates at ten times it; after 60 % of "
        "the steps the bits that stay are trained on, with new momentum, since batch norms have "
        "averaged over what was dropped",
    ),
}
# In the order of a table: what each detail of a 2-bit quantizer is worth. ``--method details`` runs all of them.
DETAILS = {
    "details-tanh-public": Recipe(methods.Truncated, _TANH | {"slope": "exact", "scale_grad": True}, _ANY, _PUBLIC),
    "details-tanh": Recipe(methods.Truncated, _TANH, _ANY, "a slope of 1 and constant scales"),
    "details-tanh-slope": Recipe(methods.Truncated, _TANH | {"slope": "exact"}, _ANY, "constant scales"),
    "details-floor": Recipe(methods.Truncated, _TWO, _FLOOR, "max|w|, a constant"),
    "details-floor-gradient": Recipe(
        methods.Truncated, _TWO | {"scale_grad": True}, _FLOOR, "max|w|, and the gradient through it"
    ),
    "details-dyadic": Recipe(methods.MSQ, _FIXED | {"scale": "absmax"}, _ROUND_CLAMP, "max|w|, a constant"),
    "details-dyadic-gradient": Recipe(
        methods.MSQ,
        _FIXED | {"scale": "absmax", "scale_grad": True},
        _ROUND_CLAMP,
        "max|w|, and the gradient through it",
    ),
    "details-dyadic-mean": Recipe(methods.MSQ, _FIXED, _ROUND_CLAMP, "2.8 mean|w|, a constant"),
    "details-sign-2": Recipe(
        methods.MSQ,
        _FIXED | {"grid": "sign", "scale": 3.26},
        _ROUND_CLAMP,
        "2 bits beside a sign, 7 levels, 3.26 mean|w|",
    ),
    "details-sign-1": Recipe(
        methods.MSQ,
        _FIXED | {"grid": "sign", "bits": 1, "scale": 3.07},
        _ROUND_CLAMP,
        "1 bit beside a sign, 3 levels, 3.07 mean|w|",
    ),
}
DETAILS["details-float"] = Recipe(methods.Float, {}, "-", "float, for as many steps")
RECIPES |= DETAILS


def _at(n):
    """What defaults are chosen by: constant ``n`` bits; scales that are constants, and functions of the weights.

    The scales f mean|w| have the least squared error of normal weights. Rows that DETAILS has are not repeated.
    """
    dyadic, sign, floor = {2: (2.8, 3.26, 1.72), 3: (3.02, 3.54, 2.46), 4: (3.4, 3.88, 3.1)}[n]
    rows = {
        "dyadic": (methods.MSQ, _FIXED | {"bits": n, "scale": "absmax"}, _ROUND_CLAMP, "max|w|"),
        "dyadic-mean": (methods.MSQ, _FIXED | {"bits": n, "scale": dyadic}, _ROUND_CLAMP, f"{dyadic} mean|w|"),
        "sign": (
            methods.MSQ,
            _FIXED | {"bits": n, "grid": "sign", "scale": sign},
            _ROUND_CLAMP,
            f"{n} bits beside a sign, {sign} mean|w|",
        ),
        "floor": (methods.Truncated, _ALONE | {"widths": (n,)}, _FLOOR, "max|w|"),
        "floor-mean": (methods.Truncated, _ALONE | {"widths": (n,), "scale": floor}, _FLOOR, f"{floor} mean|w|"),
    }
    found = {f"details-{n}-tanh-public": Recipe(methods.Truncated, _TANH | _EXACT | {"widths": (n,)}, _ANY, _PUBLIC)}
    for name, (method, settings, paper, text) in rows.items():
        for suffix, told in (("", "a constant"), ("-gradient", "and the gradient through it")):
            of_row = settings | {"scale_grad": bool(suffix)}
            found[f"details-{n}-{name}{suffix}"] = Recipe(method, of_row, paper, f"{text}, {told}")
    known = [(r.method, {"scale_grad": False} | r.settings) for r in DETAILS.values() if r.settings]
    return {name: r for name, r in found.items() if (r.method, r.settings) not in known}


DEFAULTS = {n: _at(n) for n in (2, 3, 4)}
RECIPES |= DEFAULTS[2] | DEFAULTS[3] | DEFAULTS[4]

# Activations too, in front of every layer that is quantized (the networks call functional ReLUs), with LSQ's steps.
_ACTS = "inputs of all layers with LSQ's steps, the image at 8 bits; "
_IMAGE = {"overrides": {"conv": {"act_bits": 8}}}
ACTIVATIONS = {
    **{
        f"msq-a{n}": Recipe(
            methods.MSQ,
            _MSQ | {"act_bits": n} | _IMAGE,
            _MSQ_PAPER,
            f"{_ACTS}activations of {n} bits; " + _MSQ_DEVIATIONS,
        )
        for n in (4, 3, 2)
    },
    "truncquant-paper-activations": Recipe(
        methods.Truncated,
        _TRUNCQUANT_PAPER | {"act_bits": "weights", "act": "input", "act_scale": 1.0, "act_signed": False},
        _TRUNCATION,
        "inputs of the layers that are quantized, clamped to [0, 1], at the bits of the weights; "
        + _TRUNCQUANT_PAPER_DEVIATIONS,
    ),
    "truncquant-activations": Recipe(
        methods.Truncated,
        _TRUNCATED | {"scale": 2.5, "act_bits": "weights", "act": "input"} | _IMAGE,
        _TRUNCATION,
        f"{_ACTS}a step for each width, where the paper clamps to [0, 1]; scale 2.5 mean|w| without tanh",
    ),
    **{
        f"cpq-w{n}a{n}": Recipe(
            methods.CPQ,
            _BITS | {"bits": n, "act_bits": n, "act": "input"} | _IMAGE,
            "CPQ, arXiv 2109.02100",
            f"{_ACTS}activations by the uniform rule",
        )
        for n in (4, 3)
    },
}
RECIPES |= ACTIVATIONS
# Its inputs have signs where they come from a LayerNorm; queries, keys and values are quantized for attention.
_VIT = {"network": "vit", "common": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.05}}
_VIT_ACTS = {"act_bits": 4, "act_outputs": ("*.qkv",)}
_VIT_TEXT = "a ViT of 6 blocks of width 128, 4 x 4 patches; AdamW, lr 1e-3; "
VIT = {
    "vit-float": Recipe(methods.Float, {}, "-", _VIT_TEXT + "from random weights where no --init is given", **_VIT),
    "vit-msq-w4a4": Recipe(
        methods.MSQ,
        _MSQ | _VIT_ACTS | {"target": 8.0},
        _MSQ_PAPER,
        _VIT_TEXT
        + "4 bits on average; inputs of all layers, and queries, keys and values, have 4 bits; "
        + _MSQ_DEVIATIONS,
        **_VIT,
    ),
    "vit-msq-relative": Recipe(
        methods.MSQ,
        _MSQ | _RELATIVE | _VIT_ACTS | {"target": 8.0},
        _MSQ_PAPER,
        _VIT_TEXT
        + "as vit-msq-w4a4, but lambda is a part of the task's gradient in each layer, the default of MSQController; "
        + _MSQ_DEVIATIONS,
        **_VIT,
    ),
    "vit-cpq-w4a4": Recipe(
        methods.CPQ,
        _BITS | _VIT_ACTS | {"act": "input"},
        "CPQ, arXiv 2109.02100",
        _VIT_TEXT + "inputs of all layers, and queries, keys and values, have 4 bits, by the uniform rule",
        **_VIT,
    ),
}
RECIPES |= VIT
GROUPS = {
    "all": tuple(RECIPES),
    "details": tuple(DETAILS),
    "activations": (*ACTIVATIONS, "float"),
    "vit": tuple(VIT),
    **{f"details-{n}": tuple(found) for n, found in DEFAULTS.items()},
}
SEPARATE = tuple(name for name in RECIPES if name.startswith("separate-"))  # together they are one row of a table
