"""Parametrizations that quantize weights in training, and the group that quantizes a whole network in one call.

Nothing here knows a method. A method (quantops/methods/) subclasses :class:`WeightQuantizer` with what its ops need;
:func:`quantops.quantize_` registers one instance per layer with torch.nn.utils.parametrize and puts the instances
into a :class:`WeightGroup`. Who reads ``layer.weight`` gets q; the float weight is
``layer.parametrizations.weight.original``, the same Parameter object as before.

fuse="model". A forward pre-hook of the root quantizes all layers, one list call per method, dtype and device, and gives
each q to its quantizer. A read of ``layer.weight`` returns that q while it is valid: the same Parameter and version
counter, the same bits, no optimizer step since, the same output dtype, a fitting grad mode. Otherwise the layer
computes its own, so a submodule may be called alone and autocast may begin inside the model (enter it around the root's
call, or the work of the hook is wasted). The q of all layers live until the next forward of the root begins: one copy
of the weights, in q's dtype. They outlive the forward on purpose, since non-reentrant torch.utils.checkpoint reads
``layer.weight`` again in the backward pass and must find the same tensors. It finds those of the last forward: where a
q is drawn (DropBits, mode="sample") and one backward pass serves several forwards of a model with checkpointed parts,
take fuse="layer".

fuse="layer". Each layer quantizes its own weight when it is read, and no q is kept. Gradients become ready layer by
layer, which DDP needs to overlap communication; with fuse="model" they all become ready at the end of the backward
pass. Reentrant checkpointing with the penalty in the loss, and torch.compile of single blocks, need fuse="layer".
FSDP2: forward and backward work with either (sharded weights are quantized by their layers, once they are whole);
penalties, reports and controllers need whole weights and do not.

cache=True. While no weight and no bits change (gradient accumulation, evaluation), q is computed once. Each forward
still has an autograd graph of its own. Changes are seen by version counters and by torch.optim steps (fused
optimizers leave version counters alone). Writes through ``param.data`` and replays of CUDA graphs are not seen.

torch.compile traces both modes with fullgraph=True, without stash, cache or version counters. Compile the whole model,
or a function that calls it: torch traces the hooks of a compiled module apart from its forward (two graphs), those of a
module that a compiled function calls with it (one graph).

The state dict holds ``original`` and the buffers. The model can be deep-copied but, like any model with
parametrizations, not pickled whole.
"""

import re

import torch
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.optimizer import register_optimizer_step_post_hook

from quantops import checks

WEIGHT = "weight"

_steps = [0]  # optimizer steps taken in this process; also the mark that the hook below is registered


def _count_step(optimizer, args, kwargs):
    _steps[0] += 1


def _watch_optimizers():
    if len(_steps) == 1:
        _steps.append(register_optimizer_step_post_hook(_count_step))


class Slot:
    """What the last list call left for one layer. Never copied or pickled with its layer: results belong to a pass."""

    def __init__(self):
        self.given = None  # q from elsewhere, in the place of a list call: a width's, in a step over several
        self.clear()

    def clear(self):
        self.result, self.index = None, 0  # a Pass that holds q, and this layer's place in it
        self.sums = None  # the same, for what else the call gave (the penalty): a Pass without q
        self.sums_index = 0
        self.traced = None  # q inside the graph that torch.compile is tracing now

    def __reduce__(self):
        return Slot, ()


class WeightQuantizer(torch.nn.Module):
    """A parametrization original -> q. Its buffers and parameters are what q depends on besides the weight.

    A method defines ``batch_key``, a tuple that is equal for layers that may share a list call (it has whatever q
    depends on besides tensors, such as ``training``), and the functions below. Registered by
    :func:`quantops.quantize_`, not by hand.
    """

    batch_key = ()
    draws = False  # True while every forward draws a q of its own, which the cache must not keep

    def __init__(self):
        super().__init__()
        self.slot = Slot()
        self.group = None  # before quantize_ is done, and once the weight is plain again
        self.place = 0  # of the weight among the parameters of its layer
        self.layer = "model"  # the name of its layer, for messages

    @staticmethod
    def launch(quantizers, w):
        """One list call: a result with the list ``q``, in the dtype that autocast asks for."""
        raise NotImplementedError

    @staticmethod
    def revive(quantizers, w, result):
        """``result``, which has no graph, as the result of a new forward that has one."""
        raise NotImplementedError

    @staticmethod
    def measure(quantizers, w):
        """[(bits, k, beta, sq_error, scale)] as Python numbers, see :class:`quantops.report.LayerBits`."""
        raise NotImplementedError

    def stored_bits(self, bits):
        """Bits that an integer weight of ``bits`` bits takes."""
        return bits

    def to_int(self, w):
        """The IntWeight whose dequantize() is the training forward, bit for bit (the evaluated one where it draws)."""
        raise NotImplementedError

    @staticmethod
    def check_removable(model):
        """ValueError where quantizers cannot leave ``model`` alone, since the method has made more of it."""

    def wants_grad(self, w):
        """Whether q has a gradient: for the weight, or for parameters of its quantizer."""
        return w.requires_grad or any(p.requires_grad for p in self._parameters.values())

    def forward(self, original):
        given = self.slot.given
        if given is not None and given.dtype == checks.dtype_of(None, [original]):
            return given
        if torch.compiler.is_compiling():
            traced = self.slot.traced
            return self.launch([self], [original]).q[0] if traced is None else traced
        slot = self.slot
        if slot.result is not None and slot.result.serves(slot.index, self, original):
            return slot.result.value.q[slot.index]
        return self.group.compute_one(self, original)

    def right_inverse(self, value):
        """``layer.weight = value`` sets the float weight."""
        return value

    def _apply(self, fn, recurse=True):
        self.slot.clear()  # to(), half(), ... write through param.data, which no version counter sees
        self.group.clear()
        return super()._apply(fn, recurse)


def trackable(w):
    """True for plain tensors with a version counter."""
    return (type(w) in (torch.nn.Parameter, torch.Tensor) and not w.is_inference()
            and not torch._C._functorch.is_functorch_wrapped_tensor(w))


def _mark(quantizer, w):
    """What changes whenever q would: storage and version of the weight, identity and version of the rest."""
    mark = [w.data_ptr(), w._version, quantizer.batch_key]
    for t in quantizer._buffers.values():
        mark += id(t), t._version
    for t in quantizer._parameters.values():
        mark += id(t), t._version
    return mark


class Pass:
    """The result of one list call, and the state of its inputs then."""

    def __init__(self, quantizers, w, value):
        self.quantizers, self.w, self.value = quantizers, w, value
        self.marks = [_mark(p, t) if trackable(t) else None for p, t in zip(quantizers, w)]
        self.state = [[*p._buffers.values(), *p._parameters.values()] for p in quantizers]  # alive: ids stay theirs
        self.steps, self.inference = _steps[0], torch.is_inference_mode_enabled()
        self.dtype = checks.dtype_of(None, w)

    def unchanged(self, i, quantizer, w):
        """True where entry i would be computed from the same values now."""
        mark = self.marks[i]
        return (w is self.w[i] and mark is not None and mark == _mark(quantizer, w) and self.steps == _steps[0]
                and self.inference == torch.is_inference_mode_enabled())

    def serves(self, i, quantizer, w):
        """True where entry i is what a read of ``w`` would give now, in value, dtype and gradient."""
        return (self.unchanged(i, quantizer, w) and self.dtype == checks.dtype_of(None, [w])
                and (not torch.is_grad_enabled() or self.value.q[i].requires_grad == quantizer.wants_grad(w)))

    def repeats(self, quantizers, w):
        """True where the whole list call would give the same values now."""
        return (len(w) == len(self.w) and self.dtype == checks.dtype_of(None, w)
                and all(p is o for p, o in zip(quantizers, self.quantizers))
                and all(self.unchanged(i, p, t) for i, (p, t) in enumerate(zip(quantizers, w))))

    def without_q(self):
        """The same without the list q, so that holding it holds no weights."""
        light = object.__new__(Pass)
        light.__dict__.update(self.__dict__, value=self.value._replace(q=None))
        return light


class WeightGroup:
    """Layers that are quantized together. ``whole``: with fuse="model", as forward pre-hook of the root."""

    def __init__(self, layers, whole, cache):
        self.layers = layers  # [(ParametrizationList, WeightQuantizer)]
        self.whole, self.cache, self.kept = whole, cache, {}
        _watch_optimizers()

    def __getstate__(self):
        return {**self.__dict__, "kept": {}}

    def clear(self):
        """Forgets the cache."""
        self.kept = {}

    def batches(self):
        """Lists (quantizers, weights) that one call can take, of the layers that have not been given their q."""
        return batches((p, owner.original) for owner, p in self.layers if p.slot.given is None)

    def __call__(self, root, args):
        """Forward pre-hook of the root: q of all layers."""
        if torch.compiler.is_compiling():
            for quantizers, w in self.batches():
                q = launch(quantizers, w).q
                for p, t in zip(quantizers, q):
                    p.slot.traced = t
            return
        for _, p in self.layers:
            p.slot.clear()  # frees the last pass before the next is computed
        for quantizers, w in self.batches():
            # Sharded weights (FSDP2) and the like are quantized by their layers, once they are whole.
            own = [i for i, t in enumerate(w) if trackable(t)]
            if len(own) < len(w):
                quantizers, w = [quantizers[i] for i in own], [w[i] for i in own]
            if w:
                self._leave(self._compute(quantizers, w))

    def end_trace(self, root, args, output):
        """Forward hook of the root: what was traced belongs to this forward, and must not become a graph's output."""
        for _, p in self.layers:
            p.slot.traced = None

    def compute_one(self, p, w):
        """q of one layer, when its weight is read and no valid q is there."""
        done = self._compute([p], [w])
        if not self.whole:
            p.slot.sums, p.slot.sums_index = done.without_q(), 0
        return done.value.q[0]

    def _compute(self, quantizers, w):
        if not self.cache or quantizers[0].draws or torch._C._are_functorch_transforms_active():
            return Pass(quantizers, w, launch(quantizers, w))
        key = tuple(id(p) for p in quantizers)
        kept = self.kept.get(key)
        if kept is None or not kept.repeats(quantizers, w):
            kept = None
            self.kept.pop(key, None)  # frees the old q before the new one is computed
            with torch.no_grad():
                kept = self.kept[key] = Pass(quantizers, w, launch(quantizers, w))
        if not torch.is_grad_enabled() or not any(p.wants_grad(t) for p, t in zip(quantizers, w)):
            return kept
        return Pass(quantizers, w, quantizers[0].revive(quantizers, w, kept.value))

    def _leave(self, done):
        for i, p in enumerate(done.quantizers):
            p.slot.result, p.slot.index = done, i
            p.slot.sums, p.slot.sums_index = done, i


def launch(quantizers, w):
    """The list call of the quantizers' method, whose errors name the layer in the place of its number in the list."""
    try:
        return quantizers[0].launch(quantizers, w)
    except ValueError as error:
        found = re.match(r"(\w+)(?:\[\d+\])*?(?:\[(\d+)\])?: ", str(error))
        if not found or (found[2] is None and len(quantizers) > 1):
            raise
        layer = quantizers[int(found[2] or 0)].layer
        raise ValueError(f"{layer}: {found[1]}: {str(error)[found.end():]}") from error


def batches(pairs):
    """Groups (quantizer, weight) pairs into the lists (quantizers, weights) that one call can take, in order."""
    found = {}
    for p, w in pairs:
        quantizers, weights = found.setdefault((p.batch_key, w.dtype, w.device, p.wants_grad(w)), ([], []))
        quantizers.append(p)
        weights.append(w)
    return list(found.values())


def shown(t):
    """An integer tensor of one element, as it is printed."""
    return "?" if t.is_meta else int(t)


def check_only(name, owner):
    """ValueError where a weight has other parametrizations besides its quantizer."""
    if len(owner) > 1:
        raise ValueError(f"{name or 'model'}: expected a weight with no other parametrization than that of "
                         f"quantize_, got {', '.join(type(p).__name__ for p in owner)}")


def check_module(model):
    """TypeError for what is not a module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")


def quantized(model):
    """[(layer name, ParametrizationList, WeightQuantizer)] of a model, in module order."""
    check_module(model)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ParametrizationList) and isinstance(module[0], WeightQuantizer):
            found.append((name.removesuffix("parametrizations." + WEIGHT).removesuffix("."), module, module[0]))
    return found
