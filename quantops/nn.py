"""Parametrizations that quantize weights in training, and the group that quantizes a whole network in one call.

Nothing here knows a method. A method (quantops/methods/) subclasses :class:`WeightQuantizer` with what its ops need;
:func:`quantops.quantize_` registers one instance per layer with torch.nn.utils.parametrize and puts the instances
into a :class:`WeightGroup`. Who reads ``layer.weight`` gets q; the float weight is
``layer.parametrizations.weight.original``, the same Parameter object as before.

fuse="model". A forward pre-hook of the root quantizes all layers, one list call per method, dtype and device, and gives
each q to its quantizer. A read of ``layer.weight`` returns that q while it is valid: the same thread, Parameter and
version counter, the same bits, no optimizer step since, the same output dtype, a fitting grad mode, a graph that no
backward pass has used up. Otherwise the layer computes its own, so a submodule may be called alone and autocast may
begin inside the model (enter it around the root's call, or the work of the hook is wasted). The q of all layers live
until the next forward of the root by the same thread begins, or ends where that is under no_grad: one copy of the
weights, in q's dtype. They outlive a training forward on purpose, for what is computed again in the backward pass.

Threads. What a pass leaves belongs to the thread that ran it, and so may hundreds of threads evaluate one model, and
several train it; cache=True gives those that evaluate one q for all.

Checkpointing. Parts that torch.utils.checkpoint computes again take q of the last forward where it is as it was, with
use_reentrant=False, and compute their own otherwise: the values are the same. Where q is drawn (DropBits,
mode="sample") only the q of that very forward will do: RuntimeError where another one came between, and with
use_reentrant=True. fuse="layer", where a part that is computed again draws the same again, has no such limits.

fuse="layer". Each layer quantizes its own weight when it is read, and no q is kept. Gradients become ready layer by
layer, which DDP needs to overlap communication; with fuse="model" they all become ready at the end of the backward
pass. torch.compile of single blocks needs fuse="layer".
FSDP2 and tensor parallel: sharded weights are quantized by their layers, once they are whole (FSDP2) or each process
its own part; penalties, reports and controllers reduce what each process has computed of its part, see
quantops/sharded.py.

cache=True. While no weight and no bits change (gradient accumulation, evaluation), q is computed once. Each forward
still has an autograd graph of its own. Changes are seen by version counters, those of q among them, and by torch.optim
steps (fused optimizers leave version counters alone). Writes through ``param.data``, numpy or DLPack and replays of
CUDA graphs are not seen.

torch.compile traces both modes with fullgraph=True, without stash, cache or version counters. Compile the whole model,
or a function that calls it: torch traces the hooks of a compiled module apart from its forward (two graphs), those of a
module that a compiled function calls with it (one graph).

The state dict holds ``original``, the buffers, and what :func:`quantops.prepare` makes the quantized model from. The
model can be deep-copied and pickled whole. torch.nn.utils.parametrize.remove_parametrizations takes a layer out of its
group, and the hooks with the last one.
"""

import re
import weakref
from contextlib import contextmanager, nullcontext
from itertools import cycle

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from quantops.autocast import dtype_for, is_cast, of_layers
from quantops.autograd.common import refuse_tracing
from quantops.computed import PLAIN, Computed, computed
from quantops.layers import ROWS, WEIGHT, from_rows, to_rows
from quantops.owners import owners
from quantops.per_thread import Mine, PerThread, Slot, in_backward
from quantops.sharded import any_sharded
from quantops.state import Settings, versions_of

_steps = [0]  # optimizer steps taken in this process; also the mark that the hook below is registered


def _count_step(optimizer, args, kwargs):
    _steps[0] += 1


def _watch_optimizers():
    if len(_steps) == 1:
        _steps.append(register_optimizer_step_post_hook(_count_step))


class WeightQuantizer(Settings, torch.nn.Module):
    """A parametrization original -> q. Its buffers and parameters are what q depends on besides the weight.

    A method defines ``batch_key``, a tuple that is equal for layers that may share a list call (it has whatever q
    depends on besides tensors, such as ``training``), and the functions below. Registered by
    :func:`quantops.quantize_`, not by hand.
    """

    batch_key = ()
    identity = False  # True where the gradient of q is that of the weight, so that no backward pass uses its graph up
    by_shards = False  # True where its functions take weights that are sharded, each process its own part
    bypassed = False  # True while the weight holds q itself, which is read as it is
    cast = True  # False for a layer whose weights autocast leaves as they are
    draws = False  # True while every forward draws a q of its own, which the cache must not keep

    def __init__(self):
        super().__init__()
        self.slot = Slot()
        self.given = PerThread()  # q from elsewhere, in the place of a list call: a width's, in a step over several
        self.moves = 0  # counts to(), half(), ...: they write through param.data, which no version counter sees
        self.group = None  # before quantize_ is done, and once the weight is plain again
        self.place = 0  # of the weight among the parameters of its layer
        self.parameter = WEIGHT  # the name that it has there
        self.layer = "model"  # the name of the weight, for messages
        self.row_dims = ROWS  # the dims that have a scale per element, see quantops/layers.py
        self.recipe, self.shape = None, None  # what quantize_ made it from, fit for JSON; and of which shape

    # These take weights with their rows in dim 0.

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

    def state_for(self, w):
        """The own state, as of state_dict(), that goes with a float weight loaded from elsewhere."""
        return self.state_dict()

    def versions(self):
        return versions_of(self._buffers.values())

    @property
    def source(self):
        """Itself: the quantizer of a weight, which those that share it know too."""
        return self

    def gone(self):
        """The weight is plain again."""
        if self.group is not None:
            self.group.drop(self)

    def rows(self, w):
        """The weight with its rows in dim 0."""
        return to_rows(w, self.row_dims)

    @staticmethod
    def check_removable(model):
        """ValueError where quantizers cannot leave ``model`` alone, since the method has made more of it."""

    def wants_grad(self, w):
        """Whether q has a gradient: for the weight, or for parameters of its quantizer."""
        return w.requires_grad or any(p.requires_grad for p in self._parameters.values())

    def quick(self, owner):
        """q of the root's forward that this thread runs, for a read of the weight of ``owner``; None where there is
        none or more is to be done, which :meth:`forward` does."""
        found = self.slot.result
        hooks = owner._forward_hooks or owner._forward_pre_hooks or self._forward_hooks or self._forward_pre_hooks
        if found is None or hooks or self.bypassed or self.given.any() or len(owner._modules) > 1:
            return None
        done, i = found
        w = owner._parameters.get("original")
        return done.value.q[i] if done.running and done.serves(i, self, w) else None

    def forward(self, original):
        if self.bypassed:
            return original
        given = self.given.get()
        if given is not None and given.dtype == dtype_for(self, [original]):
            return given
        if torch.compiler.is_compiling():
            traced = self.slot.traced
            return launch([self], [original]).q[0] if traced is None else traced
        group = self.group
        if group.whole:
            found = self.slot.result
            if found is not None and found[0].serves(found[1], self, original):
                q = found[0].value.q[found[1]]
                return q if found[0].running else self._guarded(q, original)
        return self._guarded(group.compute_one(self, original), original)

    def _guarded(self, q, original):
        """q, whose writes go to the float weight."""
        if in_backward() or torch._C._are_functorch_transforms_active():
            return q
        return computed(q, lambda: original, self.layer)

    def right_inverse(self, value):
        """``layer.weight = value`` sets the float weight. ValueError for another shape."""
        value = value.float_weight() if isinstance(value, Computed) else value
        if self.shape is not None and value.shape != self.shape:
            raise ValueError(
                f"{self.layer}: expected a weight of shape {tuple(self.shape)}, got {tuple(value.shape)}; to resize a "
                "layer take quantops.unquantize_(model), resize, and quantize_ again"
            )
        return value

    def about(self):
        return {} if self.recipe is None else {"recipe": self.recipe}

    def _apply(self, fn, recurse=True):
        self.moves += 1
        self.slot.clear()
        self.group.clear()
        return super()._apply(fn, recurse)


def trackable(w):
    """True for plain tensors with a version counter."""
    return type(w) in PLAIN and not w.is_inference() and not torch._C._functorch.is_functorch_wrapped_tensor(w)


def _mark(quantizer, w):
    """What changes whenever q would: storage and version of the weight, identity and version of the rest."""
    buffers, state = quantizer._buffers.values(), quantizer._parameters.values()
    versions = versions_of(buffers)
    if versions != quantizer.noted:
        quantizer.check_written()
    mark = w.data_ptr(), w._version, quantizer.batch_key, quantizer.moves, versions, *map(id, buffers)
    return (*mark, *map(id, state), *versions_of(state)) if state else mark


class Pass:
    """The result of one list call, and the state of its inputs then."""

    def __init__(self, quantizers, w, value):
        self.quantizers, self.w, self.value = quantizers, w, value
        self.marks = [_mark(p, t) if trackable(t) else None for p, t in zip(quantizers, w)]
        self.state = [(*p._buffers.values(), *p._parameters.values()) for p in quantizers]  # alive: ids stay theirs
        self.steps, self.inference = _steps[0], torch.is_inference_mode_enabled()
        self.dtype, self.device = dtype_for(quantizers[0], w), w[0].device.type
        self.task = torch._C._current_graph_task_id()
        self.turn = None  # of the forwards that draw, where it has drawn
        self.running = True  # until the forward it was made for ends, in which no backward pass uses its graph up

    def unchanged(self, i, quantizer, w):
        """True where entry i would be computed from the same values now."""
        mark = self.marks[i]
        return (
            mark is not None
            and w is self.w[i]
            and mark == _mark(quantizer, w)
            and self.steps == _steps[0]
            and self.inference == torch.is_inference_mode_enabled()
        )

    def fits(self, i, quantizer, w):
        """True where entry i has the value, the dtype and the wish for a gradient that a read of ``w`` has now."""
        return (
            self.value.q is not None
            and self.unchanged(i, quantizer, w)
            and self.dtype == dtype_for(quantizer, [w])
            and (not torch.is_grad_enabled() or self.value.q[i].requires_grad == quantizer.wants_grad(w))
        )

    def serves(self, i, quantizer, w):
        """True where entry i is what a read of ``w`` gives now, with its graph."""
        return (
            self.task == torch._C._current_graph_task_id()
            and self.fits(i, quantizer, w)
            and (
                self.running
                or quantizer.identity
                or not torch.is_grad_enabled()
                or not used_up(self.value.q[i].grad_fn)
            )
        )

    def repeats(self, quantizers, w):
        """True where the whole list call would give the same values now, and nobody has written into those it gave."""
        return (
            len(w) == len(self.w)
            and self.dtype == dtype_for(quantizers[0], w)
            and all(t._version == v for t, v in zip(self.value.q, self.versions))
            and all(p is o for p, o in zip(quantizers, self.quantizers))
            and all(self.unchanged(i, p, t) for i, (p, t) in enumerate(zip(quantizers, w)))
        )

    def free(self):
        """Holds no q any more, and whoever has a place in it finds none."""
        self.value = self.value._replace(q=None)

    def keep(self):
        """Marks q, which many passes are to have: who writes into it is noticed."""
        self.versions = [t._version for t in self.value.q]
        return self

    def copy(self):
        """The same for the pass that runs now, to be freed by itself."""
        other = object.__new__(Pass)
        other.__dict__.update(self.__dict__, inference=torch.is_inference_mode_enabled())
        return other


def op_node(node):
    """The node of the op behind those of views, such as those of rows, which take no weak references."""
    while node is not None and not hasattr(type(node), "_raw_saved_tensors") and node.next_functions:
        node = node.next_functions[0][0]
    return node


def used_up(node):
    """Whether a backward pass has gone through a node of a graph, so that no other can."""
    try:
        node = op_node(node)
        return node is not None and node._raw_saved_tensors is None  # raises where it has
    except RuntimeError:
        return True


class _Unseen(torch.autograd.graph.saved_tensors_hooks):
    """What a quantizer saves within a checkpointed part is not counted as the part's: computed again, that part may
    find q where the layer had computed its own, or the reverse."""

    def __init__(self):
        super().__init__(lambda t: (t, t._version), self._unpack)

    @staticmethod
    def _unpack(saved):
        t, version = saved
        if t._version != version:  # torch looks at this only where there are no hooks
            raise RuntimeError(
                f"a weight of shape {tuple(t.shape)} was changed in place after the forward pass that "
                "this backward pass needs it from"
            )
        return t


class WeightGroup:
    """Layers that are quantized together. ``whole``: with fuse="model", as forward pre-hook of the root; ``lazy``: and
    by the first layer that is read where there is no q of all layers, for roots whose forward may never run."""

    def __init__(self, layers, whole, cache, lazy=False):
        self.layers, self.lazy = layers, lazy  # [(ParametrizationList, WeightQuantizer)]
        self.whole, self.cache, self.mine = whole, cache, Mine()
        self.root = None  # the module whose forward it begins
        self.drawn = {}  # {weak reference to the graph's node of q that were drawn: what stands for their forward}
        self.clear()
        _watch_optimizers()

    def drop(self, quantizer):
        """Takes out a layer whose weight is plain again; with the last one the hooks of the root go."""
        self.layers = [(owner, p) for owner, p in self.layers if p is not quantizer]
        self.clear()
        quantizer.slot.clear()
        quantizer.group = None
        if not self.layers and self.root is not None:
            for hooks in (self.root._forward_pre_hooks, self.root._forward_hooks):
                for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", hook) is self]:
                    del hooks[key]
                    self.root._forward_hooks_always_called.pop(key, None)

    def __getstate__(self):
        return {**self.__dict__, "kept": {}, "latest": {}, "drawn": {}}

    def clear(self):
        """Forgets the cache, and what parts that are computed again might take."""
        self.kept = {}
        self.latest = {}  # {quantizer: (Pass with a graph, place in it)} of whichever thread

    def free(self):
        """Frees the q that this thread's last pass left."""
        for done in self.mine.passes:
            done.free()
        self.mine.passes = []

    def batches(self):
        """Lists (quantizers, weights) that one call can take, of the layers that have not been given their q."""
        return batches((p, owner.original) for owner, p in self.layers if p.given.get() is None)

    def __call__(self, root, args):
        """Forward pre-hook of the root: q of all layers."""
        if torch.compiler.is_compiling():
            self.mine.tracing = True
            for quantizers, w in self.batches():
                q = launch(quantizers, w).q
                for p, t in zip(quantizers, q):
                    p.slot.traced = t
            return
        if getattr(root, "_is_replica", False):  # of DataParallel: it has weights of its own
            self.free()
            return
        self._start(running=True)

    def _start(self, running):
        """q of all layers. ``running``: until the root's forward ends."""
        self.free()  # before the next is computed
        turn = object()
        for quantizers, w in self.batches():
            # Sharded weights (FSDP2) and the like are quantized by their layers, once they are whole.
            own = [i for i, t in enumerate(w) if trackable(t)]
            if len(own) < len(w):
                quantizers, w = [quantizers[i] for i in own], [w[i] for i in own]
            if w:
                done = self._compute(quantizers, w)
                done.running = running
                self._leave(done, turn)

    def end(self, root, args, output):
        """Forward hook of the root."""
        if self.mine.tracing:
            self.mine.tracing = False
            for _, p in self.layers:
                p.slot.traced = None  # it belongs to this forward, and must not become a graph's output
        if torch.compiler.is_compiling():
            return
        for done in self.mine.passes:
            done.running = False
        if not torch.is_grad_enabled():  # nothing is computed again: threads that evaluate keep no weights
            self.free()

    def compute_one(self, p, w):
        """q of one layer, when its weight is read and this thread's pass has none that is valid."""
        if not self.whole:
            done = self._compute([p], [w])
            q = done.value.q[0]
            done.free()
            p.slot.result = done, 0
            return q
        if in_backward():
            found = self._recomputed(p, w)
            if found is not None:
                return found
        with nullcontext() if _saved_tensors_hooks() is None else _Unseen():
            if self.lazy and not in_backward() and not p.draws and self._begin(p, w):
                done, i = p.slot.result
                return done.value.q[i]
            return self._compute([p], [w]).value.q[0]

    def _begin(self, p, w):
        """Where no forward of the root has done it, q of all layers; False where this one has to compute its own, as
        where autocast is on for a part of them."""
        done, i = p.slot.result or (None, 0)
        other_dtype = done is not None and done.dtype != dtype_for(p, [w])
        if not trackable(w) or (other_dtype and done.value.q is not None and done.unchanged(i, p, w)):
            return False
        self._start(running=False)
        done, i = p.slot.result or (None, 0)
        return done is not None and done.fits(i, p, w)

    def _recomputed(self, p, w):
        """q for a checkpointed part that is computed again, from the pass it was part of; None: the layer's own.

        Non-reentrant checkpointing takes values alone from there: q of any pass will do that has them. Reentrant
        checkpointing goes backward through each part by itself, and through the graph of a pass one can go once.
        """
        done, i = self.latest.get(p, (None, 0))
        values_alone = _saved_tensors_hooks() is not None or not torch.is_grad_enabled()
        fits = values_alone and done is not None and done.fits(i, p, w)
        if p.draws and torch.is_grad_enabled() and not (fits and self._only(done)):
            raise RuntimeError(
                "a checkpointed part is computed again, and it is not known which weights were drawn "
                'for it (DropBits, mode="sample"): take fuse="layer", where it draws the same again'
            )
        return done.value.q[i] if fits else None

    def _only(self, done):
        """Whether no other forward that drew its q may have a backward pass to come."""
        pending = {turn for ref, turn in list(self.drawn.items()) if (node := ref()) and not used_up(node)}
        return pending == {done.turn}

    def _compute(self, quantizers, w):
        keeps = self.cache and not quantizers[0].draws and all(map(trackable, w))
        if self.cache and torch._C._are_functorch_transforms_active():
            with _naming("cache=True, which is not used within torch.func"):
                return Pass(quantizers, w, launch(quantizers, w))
        if not keeps:
            return Pass(quantizers, w, launch(quantizers, w))
        key = tuple(id(p) for p in quantizers)
        kept = self.kept.get(key)
        kept = kept and kept.copy()
        if kept is None or not kept.repeats(quantizers, w):
            kept = None
            self.kept.pop(key, None)  # frees the old q before the new one is computed
            with torch.inference_mode(False), torch.no_grad():  # inference tensors have no version
                done = self.kept[key] = Pass(quantizers, w, launch(quantizers, w)).keep()
            kept = done.copy()
        if not torch.is_grad_enabled() or not any(p.wants_grad(t) for p, t in zip(quantizers, w)):
            return kept
        return Pass(quantizers, w, revive(quantizers, w, kept.value))

    def _leave(self, done, turn):
        self.mine.passes.append(done)
        places = [(done, i) for i in range(len(done.w))]
        for p, place in zip(done.quantizers, places):
            p.slot.result = place
        if torch.is_grad_enabled():
            self.latest.update(zip(done.quantizers, places))
            node = op_node(done.value.q[0].grad_fn)
            if done.quantizers[0].draws and node is not None:
                for ref in list(self.drawn):
                    if (old := ref()) is None or used_up(old):
                        self.drawn.pop(ref, None)
                done.turn, self.drawn[weakref.ref(node)] = turn, turn


@contextmanager
def _naming(setting):
    """Errors of what is not implemented name a setting that does not change it."""
    try:
        yield
    except NotImplementedError as error:
        raise NotImplementedError(f"{error} ({setting})") from error


def _saved_tensors_hooks():
    """Those that what is saved now goes through, as in checkpointed parts; None where there are none."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def launch(quantizers, w):
    """The list call of the quantizers' method, whose errors name the layer in the place of its number in the list."""
    if not quantizers[0].by_shards and any_sharded(w):
        raise ValueError(
            f"{quantizers[0].layer}: expected whole weights in the forward pass, got sharded ones (tensor parallel), "
            "which MSQ and TruncQuant take; FSDP2 makes them whole"
        )
    refuse_tracing("a quantized weight")
    try:
        with of_layers(quantizers, w):
            return as_weights(quantizers, w, quantizers[0].launch(quantizers, rows_of(quantizers, w)))
    except ValueError as error:
        found = re.match(r"(\w+)(?:\[\d+\])*?(?:\[(\d+)\])?: ", str(error))
        if not found or (found[2] is None and len(quantizers) > 1):
            raise
        layer = quantizers[int(found[2] or 0)].layer
        raise ValueError(f"{layer}: {found[1]}: {str(error)[found.end() :]}") from error


def revive(quantizers, w, result):
    """A result without a graph, as that of a new forward that has one."""
    result = result._replace(q=rows_of(quantizers, result.q))
    with of_layers(quantizers, w):
        return as_weights(quantizers, w, quantizers[0].revive(quantizers, rows_of(quantizers, w), result))


def rows_of(quantizers, w):
    """The weights with their rows in dim 0."""
    return [p.rows(t) for p, t in zip(quantizers, w)]


def as_weights(quantizers, w, result):
    """A result whose q, of one width or of several in turn, have rows in dim 0, with q in the shapes of ``w``."""
    if all(p.row_dims == ROWS for p in quantizers):
        return result
    q = [from_rows(t, p.row_dims, v.shape) for t, p, v in zip(result.q, cycle(quantizers), cycle(w))]
    return result._replace(q=q)


def batches(pairs):
    """Groups (quantizer, weight) pairs into the lists (quantizers, weights) that one call can take, in order."""
    found = {}
    for p, w in pairs:
        key = p.batch_key, w.dtype, w.device, is_cast(p, w), p.wants_grad(w)
        quantizers, weights = found.setdefault(key, ([], []))
        quantizers.append(p)
        weights.append(w)
    return list(found.values())


def shown(t):
    """An integer tensor of one element, as it is printed."""
    return "?" if t.is_meta else int(t)


def check_only(name, owner):
    """ValueError where a weight has other parametrizations besides its quantizer."""
    if len(owner) > 1:
        raise ValueError(
            f"{name or 'model'}: expected a weight with no other parametrization than that of "
            f"quantize_, got {', '.join(type(p).__name__ for p in owner)}"
        )


def quantized(model):
    """[(name, ParametrizationList, WeightQuantizer)] of a model, in module order, each weight once. Its name is that of
    its layer, where it is the layer's ``weight``, and ``layer.parameter`` otherwise."""
    return [
        (path if parameter == WEIGHT else f"{path}.{parameter}".removeprefix("."), owner, owner._modules["0"])
        for path, parameter, owner in owners(model)
        if isinstance(owner._modules["0"], WeightQuantizer)
    ]


def parameter_name(name, quantizer):
    """``layer.parameter`` of a weight that :func:`quantized` calls ``name``."""
    return f"{name}.{WEIGHT}".removeprefix(".") if quantizer.parameter == WEIGHT else name
