"""The map of the package: schema, default kernel, fake and autograd of every registered op, ``torch.ops.quantops.*``.

Every op takes a list of weights; a single weight is a list of one. In all schemas: the weights of a list share dtype
and device; ``scale`` holds one contiguous tensor per weight, with one element or one per row (dim 0), of the
arithmetic dtype (float64 for float64 weights, else float32); ``bits`` and ``k`` are int32 tensors on the weights'
device with one element per weight; per-weight sums come back as one tensor with an element per weight. ``full``
chooses the full grid over the dyadic one. ``covered`` promises that every weight is inside its scale (the scale is
max|w|): the backward is then the identity but for the penalty.

Of the categorical ops: ``alpha`` and ``sigma`` are like ``scale``, with equally many elements; ``gates`` holds a tensor
of ``bits`` values per weight, or nothing; ``seed`` is an int64 tensor of one element; ``mode`` and ``grad_of`` count in
MODES and GRADS of the reference.

The default kernel of each op is the reference, on any device; compiled backends (see backends.py) take over theirs.
"""

import torch

from quantops import checks, reference
from quantops.layout import empty_like
from quantops.reference.categorical import GRADS, MAX_SOFT_BITS, MODES
from quantops.reference.packing import LAYOUTS, data_shape, split_shapes
from quantops.reference.truncate import COMPANDINGS, tanh_curvature, truncate_scale_terms
from quantops.reference.uniform import GRIDS, MAX_BITS, RULES, acc_dtype

_lib = torch.library.Library("quantops", "DEF")

OPS = {
    # name: schema of arguments and results. A family's ops stand together; kernels/<family>.py has functions of
    # these names and arguments.
    "uniform": {
        "absmax": "(Tensor[] w, bool per_row) -> Tensor",
        "absmean": "(Tensor[] w, bool per_row) -> Tensor",
        "round_clamp": "(Tensor[] w, Tensor[] scale, Tensor bits, bool full, bool signed, bool covered, "
        "ScalarType dtype) -> Tensor[]",
        "round_clamp_out": "(Tensor[] w, Tensor[] scale, Tensor bits, bool full, bool signed, Tensor(a!)[] q) -> ()",
        "msq": "(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, bool full, bool covered, ScalarType dtype) -> "
        "(Tensor[] q, Tensor penalty, Tensor nonzero, Tensor sq_error)",
        "msq_out": "(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, bool full, Tensor(a!)[] q, "
        "Tensor(b!) penalty, Tensor(c!) nonzero, Tensor(d!) sq_error) -> ()",
        "lsb": "(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k) -> Tensor[]",
        "lsb_stats": "(Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, bool full, bool covered) -> "
        "(Tensor penalty, Tensor nonzero, Tensor sq_error)",
        "uniform_backward": "(Tensor[] grad, Tensor? grad_penalty, Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, "
        "bool full, bool signed, bool scale_grad) -> (Tensor[] grad_w, Tensor[] grad_scale)",
        "add_lsb_grad_": "(Tensor(a!)[] grad, Tensor[] w, Tensor[] scale, Tensor bits, Tensor k, Tensor strength) "
        "-> ()",
        "encode": "(Tensor[] w, Tensor[] scale, Tensor bits, int rule, bool signed) -> Tensor[]",
        "decode": "(Tensor[] codes, Tensor[] scale, Tensor bits, bool full, bool signed, ScalarType dtype) -> "
        "Tensor[]",
    },
    # bits: (widths, weights). Lists of q and of their gradients run width by width: that of width j of weight i is
    # entry j * len(w) + i, an empty tensor where there is no gradient. out_scale: [] where it is the scale.
    "truncate": {
        "truncate": "(Tensor[] w, Tensor[] scale, Tensor[] out_scale, Tensor bits, Tensor base_bits, int rule, "
        "bool tanh, bool covered, ScalarType dtype) -> Tensor[] q",
        "truncate_backward": "(Tensor[] grads, Tensor[] w, Tensor[] scale, Tensor[] out_scale, Tensor bits, "
        "Tensor base_bits, int rule, bool tanh, bool covered, bool scale_grad) -> "
        "(Tensor[] grad_w, Tensor[] grad_scale, Tensor[] grad_out_scale)",
    },
    # `data` is uint8 in the layout of LAYOUTS[layout], of codes of `stored` bits each. `sizes` are those of all shapes,
    # one after another, of which each weight has `dims`. The bits that are packed are integers, not a tensor: the size
    # of `data` depends on them.
    "packing": {
        "pack": "(Tensor[] codes, int[] bits, int layout) -> Tensor[]",
        "unpack": "(Tensor[] data, SymInt[] sizes, int[] dims, int[] stored, Tensor bits, int layout) -> Tensor[]",
        "decode_packed": "(Tensor[] data, SymInt[] sizes, int[] dims, int[] stored, Tensor[] scale, Tensor bits, "
        "int layout, bool full, bool signed, ScalarType dtype) -> Tensor[]",
    },
    "categorical": {
        "categorical": "(Tensor[] x, Tensor[] alpha, Tensor[] sigma, Tensor bits, Tensor[] gates, Tensor? seed, int mode, "
        "int grad_of, bool signed, ScalarType dtype) -> Tensor[]",
        "categorical_backward": "(Tensor[] grad, Tensor[] x, Tensor[] alpha, Tensor[] sigma, Tensor bits, Tensor[] gates, "
        "Tensor? seed, int mode, int grad_of, bool signed, bool scale_grad, bool gate_grad) -> "
        "(Tensor[] grad_x, Tensor[] grad_alpha, Tensor[] grad_sigma, Tensor[] grad_gates)",
    },
}

for _family in OPS.values():
    for _name, _schema in _family.items():
        _lib.define(_name + _schema)

ops = torch.ops.quantops


def checked(name, kernel):
    """A Python kernel of the op ``name`` behind what the compiled ones do by themselves: the ops can be called directly,
    with anything, and those without an autograd kernel of their own must not be recorded."""
    names = [a.name for a in getattr(ops, name).default._schema.arguments]

    def checked_kernel(*args):
        checks.structure(dict(zip(names, args)))
        with torch.no_grad():
            return kernel(*args)

    return checked_kernel


def _default(fn):
    """Registers ``fn`` as the kernel of the op of its name on every device that has no other."""
    name = fn.__name__.removeprefix("_")
    _lib.impl(name, checked(name, fn), "CompositeExplicitAutograd")
    return fn


def _grid(full):
    return GRIDS[1] if full else GRIDS[0]


def _flat(results, per_row):
    if per_row:
        return torch.cat(results) if len(results) > 1 else results[0]
    return torch.stack(results)


def _laid_out(results, like):
    """Results in the layout that the compiled kernels and the fakes give them."""
    return [empty_like(t, r.dtype).copy_(r) for r, t in zip(results, like)]


@_default
def _absmax(w, per_row):
    return _flat([reference.absmax(t, per_row=per_row) for t in w], per_row)


@_default
def _absmean(w, per_row):
    return _flat([reference.absmean(t, per_row=per_row) for t in w], per_row)


@_default
def _round_clamp(w, scale, bits, full, signed, covered, dtype):
    _check_values(scale, bits)
    return _laid_out([reference.round_clamp(t, s, n, signed=signed, grid=_grid(full), out_dtype=dtype)
                      for t, s, n in zip(w, scale, bits.reshape(-1))], w)


@_default
def _round_clamp_out(w, scale, bits, full, signed, q):
    for out, value in zip(q, _round_clamp(w, scale, bits, full, signed, False, q[0].dtype)):
        out.copy_(value)


@_default
def _msq(w, scale, bits, k, full, covered, dtype):
    _check_values(scale, bits, k)
    each = [reference.msq(t, s, n, kk, grid=_grid(full), out_dtype=dtype)
            for t, s, n, kk in zip(w, scale, bits.reshape(-1), k.reshape(-1))]
    q, *sums = zip(*each)
    return _laid_out(q, w), *(torch.stack(v) for v in sums)


@_default
def _msq_out(w, scale, bits, k, full, q, penalty, nonzero, sq_error):
    values, *sums = _msq(w, scale, bits, k, full, False, q[0].dtype)
    for out, value in zip([*q, penalty, nonzero, sq_error], [*values, *sums]):
        out.copy_(value)


@_default
def _lsb(w, scale, bits, k):
    _check_values(scale, bits, k)
    return _laid_out([reference.lsb(t, s, n, kk)
                      for t, s, n, kk in zip(w, scale, bits.reshape(-1), k.reshape(-1))], w)


@_default
def _lsb_stats(w, scale, bits, k, full, covered):
    return tuple(_msq(w, scale, bits, k, full, covered, w[0].dtype)[1:])


@_default
def _uniform_backward(grad, grad_penalty, w, scale, bits, k, full, signed, scale_grad):
    _check_values(scale, bits, k)
    each = [reference.uniform_backward(g, r, t, s, n, kk, grid=_grid(full), signed=signed)
            for g, r, t, s, n, kk in zip(
                grad or [None] * len(w), [None] * len(w) if grad_penalty is None else grad_penalty.reshape(-1),
                w, scale, bits.reshape(-1), k.reshape(-1))]
    grad_w, grad_scale = zip(*each)
    return _laid_out(grad_w, w), list(grad_scale) if scale_grad else []


@_default
def _add_lsb_grad_(grad, w, scale, bits, k, strength):
    _check_values(scale, bits, k)
    for g, t, s, n, kk in zip(grad, w, scale, bits.reshape(-1), k.reshape(-1)):
        g.copy_(reference.add_lsb_grad(g, strength.reshape(()), t, s, n, kk))


@_default
def _encode(w, scale, bits, rule, signed):
    _check_values(scale, bits)
    return _laid_out([reference.encode(t, s, n, rule=RULES[rule], signed=signed)
                      for t, s, n in zip(w, scale, bits.reshape(-1))], w)


@_default
def _decode(codes, scale, bits, full, signed, dtype):
    _check_values(scale, bits)
    each = [reference.decode(c, s, n, grid=_grid(full), signed=signed, dtype=dtype)
            for c, s, n in zip(codes, scale, bits.reshape(-1))]
    _check_codes(codes, bits.reshape(-1))
    return _laid_out(each, codes)


@_default
def _pack(codes, bits, layout):
    _check_codes(codes, bits)
    return [reference.pack(c, n, layout=LAYOUTS[layout]) for c, n in zip(codes, bits)]


@_default
def _unpack(data, sizes, dims, stored, bits, layout):
    shapes, layout = split_shapes(sizes, dims), LAYOUTS[layout]
    _check_stored(bits, stored)
    return [reference.unpack(d, shape, n, m, layout=layout)
            for d, shape, n, m in zip(data, shapes, stored, bits.reshape(-1))]


@_default
def _decode_packed(data, sizes, dims, stored, scale, bits, layout, full, signed, dtype):
    _check_values(scale, bits)
    return [reference.decode(c, s, m, grid=_grid(full), signed=signed, dtype=dtype)
            for c, s, m in zip(_unpack(data, sizes, dims, stored, bits, layout), scale, bits.reshape(-1))]


def _check_codes(codes, bits):
    """On CPU, codes out of range raise."""
    for i, (c, n) in enumerate(zip(codes, bits)):
        if c.device.type == "cpu" and c.numel() and not 0 <= int(c.min()) <= int(c.max()) < 2 ** int(n):
            raise ValueError(f"codes[{i}]: expected values in 0..2^{int(n)} - 1, got {int(c.min())}..{int(c.max())}")


def _check_stored(bits, stored):
    """On CPU, asking for more bits than are stored raises."""
    if bits.device.type == "cpu":
        for i, (m, n) in enumerate(zip(bits.reshape(-1).tolist(), stored)):
            if not 0 <= m <= n:
                raise ValueError(f"bits[{i}]: expected 0..{n}, the bits that are stored, got {m}")


@_default
def _truncate(w, scale, out_scale, bits, base_bits, rule, tanh, covered, dtype):
    _check_truncation(scale, out_scale, bits, base_bits)
    return [q for n in bits for q in _laid_out([
        reference.truncate(t, s, m, base_bits=base, rule=RULES[rule], companding=COMPANDINGS[tanh], out_scale=out,
                           out_dtype=dtype)
        for t, s, out, m, base in zip(w, scale, out_scale or [None] * len(w), n, base_bits.reshape(-1))], w)]


@_default
def _truncate_backward(grads, w, scale, out_scale, bits, base_bits, rule, tanh, covered, scale_grad):
    _check_truncation(scale, out_scale, bits, base_bits)
    each = [reference.truncate_backward(
        used_gradients(grads[i::len(w)], t), t, s, bits[:, i], base_bits=base, rule=RULES[rule],
        companding=COMPANDINGS[tanh], out_scale=out, covered=covered and not tanh and not scale_grad)
        for i, (t, s, out, base) in enumerate(zip(w, scale, out_scale or [None] * len(w), base_bits.reshape(-1)))]
    grad_w, grad_scale, grad_out_scale = map(list, zip(*each))
    return _laid_out(grad_w, w), grad_scale if scale_grad else [], grad_out_scale if scale_grad and out_scale else []


def used_gradients(grads, w):
    """The gradients of one weight's widths as the reference takes them: None where there is none."""
    return [None if g.numel() == 0 and w.numel() else g for g in grads]


def _check_truncation(scale, out_scale, bits, base_bits):
    """As :func:`_check_values`."""
    if bits.device.type != "cpu":
        return
    base = base_bits.reshape(-1).tolist()
    for i, b in enumerate(base):
        if not 1 <= b <= reference.uniform.MAX_BITS:
            raise ValueError(f"base_bits[{i}]: expected 1..{reference.uniform.MAX_BITS}, got {b}")
        widths = bits[:, i].tolist()
        for j, n in enumerate(widths):
            if not 1 <= n <= b or n in widths[:j]:
                raise ValueError(f"bits[{j}][{i}]: expected distinct widths in 1..base_bits = {b}, got {widths}")
    for name, values in (("scale", scale), ("out_scale", out_scale)):
        for i, s in enumerate(values):
            if not bool(((s >= 0) & (s < torch.inf)).all()):
                raise ValueError(f"{name}[{i}]: expected finite values >= 0, got {s.reshape(-1)[:8].tolist()}")


def _check_values(scale, bits, k=None):
    """On CPU, where reading costs nothing, values out of range raise before any work is done."""
    if bits.device.type != "cpu":
        return
    n = bits.reshape(-1).tolist()
    for i, v in enumerate(n):
        if not 0 <= v <= reference.uniform.MAX_BITS:
            raise ValueError(f"bits[{i}]: expected 0..{reference.uniform.MAX_BITS}, got {v}")
    for i, v in enumerate([] if k is None else k.reshape(-1).tolist()):
        if v and not 1 <= v < n[i]:
            raise ValueError(f"k[{i}]: expected 1 <= k < bits = {n[i]} (or 0 for no LSBs), got {v}")
    for i, s in enumerate(scale):
        if not bool(((s >= 0) & (s < torch.inf)).all()):
            raise ValueError(f"scale[{i}]: expected finite values >= 0, got {s.reshape(-1)[:8].tolist()}")


# Family categorical.


def _each_categorical(x, alpha, sigma, bits, gates, seed, mode, signed):
    """Arguments and options of the reference for every tensor of the list, whose elements are numbered through."""
    counts = [t.numel() for t in x]
    for i, (t, a, s, n) in enumerate(zip(x, alpha, sigma, bits.reshape(-1))):
        yield (t, a, s, n), dict(gates=gates[i] if gates else None, signed=signed, mode=MODES[mode],
                                 seed=seed, offset=sum(counts[:i]))


@_default
def _categorical(x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, dtype):
    _check_categorical(alpha, sigma, bits, gates, seed, mode, grad_of)
    return _laid_out([reference.categorical(*args, **options, out_dtype=dtype)
                      for args, options in _each_categorical(x, alpha, sigma, bits, gates, seed, mode, signed)], x)


@_default
def _categorical_backward(grad, x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, scale_grad, gate_grad):
    _check_categorical(alpha, sigma, bits, gates, seed, mode, grad_of)
    each = [reference.categorical_backward(g, *args, **options, grad_of=GRADS[grad_of])
            for g, (args, options) in zip(grad, _each_categorical(x, alpha, sigma, bits, gates, seed, mode, signed))]
    grad_x, grad_alpha, grad_sigma, grad_gates = map(list, zip(*each))
    return (_laid_out(grad_x, x), grad_alpha if scale_grad else [], grad_sigma if scale_grad else [],
            grad_gates if gate_grad and gates else [])


def _check_categorical(alpha, sigma, bits, gates, seed, mode, grad_of):
    """As _check_values."""
    if MODES[mode] == "sample" and seed is None:
        raise ValueError("seed: expected an int64 tensor of one element for mode sample, got none")
    if bits.device.type != "cpu":
        return
    soft = "soft" in (MODES[mode], GRADS[grad_of])
    most = MAX_SOFT_BITS if soft else MAX_BITS
    for i, n in enumerate(bits.reshape(-1).tolist()):
        if not 0 <= n <= most:
            raise ValueError(f"bits[{i}]: expected 0..{most}{' where soft sums are taken' if soft else ''}, got {n}")
        if gates and gates[i].numel() != n:
            raise ValueError(f"gates[{i}]: expected one value per bit ({n}), got shape {tuple(gates[i].shape)}")
        if gates and not bool(((gates[i] >= 0) & (gates[i] <= 1)).all()):
            raise ValueError(f"gates[{i}]: expected values in [0, 1], got {gates[i].tolist()}")
    for name, values in (("alpha", alpha), ("sigma", sigma)):
        for i, v in enumerate(values):
            if not bool(((v > 0) & (v < torch.inf) & ((1 / v < torch.inf) | (name == "sigma"))).all()):
                raise ValueError(f"{name}[{i}]: expected finite values > 0"
                                 f"{' whose inverse is finite' if name == 'alpha' else ''}, got {v.reshape(-1)[:8].tolist()}")


# Fakes: shapes, dtypes and layouts of the results.


def _fake(fn):
    torch.library.register_fake("quantops::" + fn.__name__.removeprefix("_fake_"), fn, lib=_lib)
    return fn


def _sums(w):
    acc = w[0].new_empty(len(w), dtype=acc_dtype(w[0].dtype))
    return acc, w[0].new_empty(len(w), dtype=torch.int64), torch.empty_like(acc)


def _scales(w, per_row):
    n = sum(t.shape[0] for t in w) if per_row else len(w)
    return w[0].new_empty(n, dtype=acc_dtype(w[0].dtype))


@_fake
def _fake_absmax(w, per_row):
    return _scales(w, per_row)


@_fake
def _fake_absmean(w, per_row):
    return _scales(w, per_row)


@_fake
def _fake_round_clamp(w, scale, bits, full, signed, covered, dtype):
    return [empty_like(t, dtype) for t in w]


@_fake
def _fake_round_clamp_out(w, scale, bits, full, signed, q):
    return None


@_fake
def _fake_msq(w, scale, bits, k, full, covered, dtype):
    return [empty_like(t, dtype) for t in w], *_sums(w)


@_fake
def _fake_msq_out(w, scale, bits, k, full, q, penalty, nonzero, sq_error):
    return None


@_fake
def _fake_lsb(w, scale, bits, k):
    return [empty_like(t, torch.int32) for t in w]


@_fake
def _fake_lsb_stats(w, scale, bits, k, full, covered):
    return _sums(w)


@_fake
def _fake_uniform_backward(grad, grad_penalty, w, scale, bits, k, full, signed, scale_grad):
    return [empty_like(t, t.dtype) for t in w], [torch.empty_like(s) for s in scale] if scale_grad else []


@_fake
def _fake_add_lsb_grad_(grad, w, scale, bits, k, strength):
    return None


@_fake
def _fake_encode(w, scale, bits, rule, signed):
    return [empty_like(t, torch.int32) for t in w]


@_fake
def _fake_decode(codes, scale, bits, full, signed, dtype):
    return [empty_like(c, dtype) for c in codes]


@_fake
def _fake_truncate(w, scale, out_scale, bits, base_bits, rule, tanh, covered, dtype):
    return [empty_like(t, dtype) for _ in range(bits.shape[0]) for t in w]


@_fake
def _fake_truncate_backward(grads, w, scale, out_scale, bits, base_bits, rule, tanh, covered, scale_grad):
    sums = [[torch.empty_like(s) for s in v] if scale_grad else [] for v in (scale, out_scale)]
    return [empty_like(t, t.dtype) for t in w], *sums


def _fake_pack(codes, bits, layout):
    return [c.new_empty(data_shape(c.numel(), n, LAYOUTS[layout]), dtype=torch.uint8) for c, n in zip(codes, bits)]


@_fake
def _fake_unpack(data, sizes, dims, stored, bits, layout):
    return [d.new_empty(shape, dtype=torch.int32) for d, shape in zip(data, split_shapes(sizes, dims))]


@_fake
def _fake_decode_packed(data, sizes, dims, stored, scale, bits, layout, full, signed, dtype):
    return [d.new_empty(shape, dtype=dtype) for d, shape in zip(data, split_shapes(sizes, dims))]


@_fake
def _fake_categorical(x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, dtype):
    return [empty_like(t, dtype) for t in x]


@_fake
def _fake_categorical_backward(grad, x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, scale_grad, gate_grad):
    alphas, sigmas = ([torch.empty_like(v) for v in values] if scale_grad else [] for values in (alpha, sigma))
    return ([empty_like(t, t.dtype) for t in x], alphas, sigmas,
            [g.new_empty(g.numel()) for g in gates] if gate_grad else [])


# Autograd. Only inputs are saved, so that nothing is kept for backward beyond the parameters themselves.
#
# The kernels are registered by hand under the Autograd key, with autograd.Functions over flat tensors, as
# torch.library.register_autograd would do it: its walk over the lists' pytrees took 70 us a call for one weight.


def _below_autograd(keyset, op, args):
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _any(grads):
    return any(g is not None for g in grads)


def _materialize(grads, w):
    """Gradients of a list: [] where none is wanted, zeros for single entries that are not used."""
    if not _any(grads):
        return []
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, w)]


class _Quantizer(torch.autograd.Function):
    """Ops of w and scale whose results are a list of q (or none), then R (or none), then sums without gradient."""

    @staticmethod
    def forward(ctx, keyset, op, args, full, signed, covered, k, *tensors):
        result = _below_autograd(keyset, op, args)
        result = tuple(result) if isinstance(result, list) else (*result[0], *result[1:]) if isinstance(
            result[0], list) else result
        w, scale, bits = args[:3]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in result[-2:] if k is not None))
        ctx.count, ctx.lists = len(w), len(result) if k is None else len(result) - 3
        ctx.full, ctx.signed, ctx.covered, ctx.dtype = full, signed, covered, w[0].dtype
        ctx.save_for_backward(*tensors, bits, *([] if k is None else [k]))
        return result

    @staticmethod
    def backward(ctx, *grads):
        grad_q, penalty = grads[: ctx.lists], (grads[ctx.lists:] or (None,))[0]
        none = [None] * ctx.count
        if penalty is None and (ctx.covered or not _any(grad_q)):
            grad_w, grad_scale = [None if g is None else g.to(ctx.dtype) for g in grad_q or none], none
        else:
            n, saved = ctx.count, ctx.saved_tensors
            w, scale, bits = list(saved[:n]), list(saved[n: 2 * n]), saved[2 * n]
            k = saved[-1] if len(saved) > 2 * n + 1 else torch.zeros_like(bits)
            # The scale is a constant in R.
            scale_grad = not ctx.covered and any(s.requires_grad for s in scale) and _any(grad_q)
            grad_w, grad_scale = ops.uniform_backward(
                _materialize(grad_q, w), penalty, w, scale, bits, k, ctx.full, ctx.signed, scale_grad)
            grad_scale = grad_scale if scale_grad else none
        return *[None] * 7, *grad_w, *grad_scale


class _QuantizerBackward(torch.autograd.Function):
    """The backward is linear in g and r; w and s count as constants there, as the STE has it."""

    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        grad, penalty, w, scale, bits, k, ctx.full, ctx.signed, _ = args
        grad_w, grad_scale = _below_autograd(keyset, op, args)
        ctx.set_materialize_grads(False)
        ctx.count, ctx.has_penalty, ctx.grad_dtype = len(w), penalty is not None, grad[0].dtype if grad else None
        ctx.save_for_backward(*w, *scale, bits, k)
        return (*grad_w, *grad_scale)

    @staticmethod
    def backward(ctx, *gradients):
        n, saved = ctx.count, ctx.saved_tensors
        w, scale, bits, k = list(saved[:n]), list(saved[n: 2 * n]), saved[2 * n], saved[2 * n + 1]
        gg_w, gg_scale = _materialize(gradients[:n], w), gradients[n:]
        grad, penalty = [None] * n, None
        if gg_w:
            grad, _ = ops.uniform_backward(gg_w, None, w, scale, bits, k, ctx.full, ctx.signed, False)
            if ctx.has_penalty:
                slopes = [b.sign() for b in ops.lsb(w, scale, bits, k)]
                penalty = torch.stack([(g * b).sum(dtype=s.dtype) for g, b, s in zip(grad, slopes, scale)])
        if _any(gg_scale):
            terms = [
                torch.zeros_like(t) if g is None else reference.uniform.per_row(g, t) *
                reference.uniform.scale_grad_term(t, s, b, _grid(ctx.full), ctx.signed)
                for g, t, s, b in zip(gg_scale, w, scale, bits.reshape(-1))]
            grad = [t if g is None else g + t for g, t in zip(grad, terms)]
        grad = [None if g is None else g.to(ctx.grad_dtype) for g in grad] if ctx.grad_dtype else []
        return None, None, None, *grad, *([penalty] if ctx.has_penalty else [])


class _Truncate(torch.autograd.Function):
    """The list of q of w, scale and out_scale."""

    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        w, _, _, bits, base_bits, ctx.rule, ctx.tanh, ctx.covered, ctx.q_dtype = args
        ctx.set_materialize_grads(False)
        ctx.count, ctx.dtype = len(w), w[0].dtype
        ctx.save_for_backward(*tensors, bits, base_bits)
        return tuple(_below_autograd(keyset, op, args))

    @staticmethod
    def backward(ctx, *grads):
        n = ctx.count
        wanted = ctx.needs_input_grad[3:]  # of w, scale, out_scale
        scale_grad = _any(grads) and any(wanted[2 * n:] if ctx.covered else wanted[n:])
        covered = ctx.covered and not ctx.tanh and not scale_grad  # dL/dw is the sum of the gradients
        used = [[g for g in grads[i::n] if g is not None] for i in range(n)]
        grad_scale, grad_out_scale = [None] * n, [None] * (len(wanted) - 2 * n)
        if covered and all(len(g) <= 1 for g in used):  # what is saved is not asked for: checkpoints need not recompute
            grad_w = [g[0].to(ctx.dtype) if g else None for g in used]
        elif not _any(grads):
            grad_w = [None] * n
        else:
            *tensors, bits, base_bits = ctx.saved_tensors
            w, scale, out_scale = tensors[:n], tensors[n: 2 * n], tensors[2 * n:]
            grad_w, *sums = ops.truncate_backward(
                _fill_in(grads, ctx.q_dtype), w, scale, out_scale, bits, base_bits, ctx.rule, ctx.tanh, covered,
                scale_grad)
            grad_w = [t if g else None for t, g in zip(grad_w, used)]
            if scale_grad:
                grad_scale, grad_out_scale = [None] * n if ctx.covered else sums[0], sums[1]
        return None, None, None, *grad_w, *grad_scale, *grad_out_scale


def _fill_in(grads, dtype):
    """Empty tensors in the place of gradients that are not there."""
    some = next(g for g in grads if g is not None)
    return [some.new_empty(0, dtype=dtype) if g is None else g for g in grads]


class _TruncateBackward(torch.autograd.Function):
    """Linear in the gradients of q. w counts as a constant but for the slope of tanh, s as one."""

    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        grads, w, scale, out_scale, bits, base_bits, ctx.rule, ctx.tanh, ctx.covered, _ = args
        ctx.set_materialize_grads(False)
        ctx.count, ctx.own_out, ctx.grad_dtype = len(w), bool(out_scale), grads[0].dtype
        ctx.used = [g.numel() > 0 for g in grads]
        ctx.save_for_backward(*w, *scale, *out_scale, bits, base_bits, *(grads if ctx.tanh else ()))
        return tuple(t for result in _below_autograd(keyset, op, args) for t in result)

    @staticmethod
    def backward(ctx, *gradients):
        n, saved = ctx.count, list(ctx.saved_tensors)
        w, scale, out_scale = saved[:n], saved[n: 2 * n], saved[2 * n: (2 + ctx.own_out) * n]
        bits, base_bits, *grads = saved[(2 + ctx.own_out) * n:]
        gg_w, gg_scale, gg_out = gradients[:n], gradients[n: 2 * n], gradients[2 * n:]
        # dL/dq has the same factor for every width.
        each, grad_w = [None] * n, [None] * n
        if _any(gg_w):
            gg_w = _materialize(gg_w, w)
            each = ops.truncate_backward(gg_w, w, scale, [], bits[:1], base_bits, ctx.rule, ctx.tanh, ctx.covered,
                                         False)[0]
            if ctx.tanh:
                grad_w = [tanh_curvature(v, used_gradients(grads[i::n], t), t, s)
                          for i, (v, t, s) in enumerate(zip(gg_w, w, scale))]
        result = [None if v is None or not used else v for v, used in zip(list(each) * bits.shape[0], ctx.used)]
        if _any(gg_scale) or _any(gg_out):
            options = {"rule": RULES[ctx.rule], "companding": COMPANDINGS[ctx.tanh]}
            for at, used in enumerate(ctx.used):
                if not used:
                    continue
                i = at % n
                ratio, inner = truncate_scale_terms(w[i], scale[i], bits[at // n, i],
                                                    base_bits=base_bits.reshape(-1)[i], **options)
                for v, term in ((gg_scale[i] if gg_scale else None, -inner if ctx.own_out else ratio - inner),
                                (gg_out[i] if gg_out else None, ratio)):
                    if v is not None:
                        v = reference.uniform.per_row(v, w[i]) * term
                        result[at] = v if result[at] is None else result[at] + v
        result = [None if g is None else g.to(ctx.grad_dtype) for g in result]
        return None, None, None, *result, *(grad_w if ctx.tanh else ())


class _Categorical(torch.autograd.Function):
    """q of x, alpha, sigma and gates; the backward computes from these what it needs, draws included."""

    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        q = _below_autograd(keyset, op, args)
        x, _, _, bits, gates, seed, *ctx.options, _ = args
        ctx.set_materialize_grads(False)
        ctx.count, ctx.gate_count, ctx.has_seed = len(x), len(gates), seed is not None
        ctx.save_for_backward(*tensors, bits, *([seed] if ctx.has_seed else []))
        return tuple(q)

    @staticmethod
    def backward(ctx, *grads):
        n = ctx.count
        if not _any(grads):
            return *[None] * 3, *[None] * (3 * n + ctx.gate_count)
        saved = list(ctx.saved_tensors)
        x, alpha, sigma, gates = (saved[:n], saved[n: 2 * n], saved[2 * n: 3 * n], saved[3 * n: 3 * n + ctx.gate_count])
        bits, seed = saved[3 * n + ctx.gate_count], saved[-1] if ctx.has_seed else None
        wanted = ctx.needs_input_grad[3:]  # of x, alpha, sigma, gates
        scale_grad, gate_grad = any(wanted[n: 3 * n]), any(wanted[3 * n:])
        grad_x, grad_alpha, grad_sigma, grad_gates = ops.categorical_backward(
            _materialize(grads, x), x, alpha, sigma, bits, gates, seed, *ctx.options, scale_grad, gate_grad)
        return (*[None] * 3, *grad_x, *(grad_alpha or [None] * n), *(grad_sigma or [None] * n),
                *(grad_gates or [None] * ctx.gate_count))


class _CategoricalBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keyset, op, args, *tensors):
        return tuple(t for listed in _below_autograd(keyset, op, args) for t in listed)

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("categorical: second derivatives are not implemented; call backward() or "
                                  "torch.autograd.grad() without create_graph=True on its result")


def _autograd(fn):
    """Registers ``fn(keyset, op, args, *args)`` as the autograd kernel of the op of its name."""
    name = fn.__name__.removeprefix("_autograd_")
    op = getattr(ops, name).default

    def kernel(keyset, *args):
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return _below_autograd(keyset, op, args)
        return fn(keyset, op, args)

    _lib.impl(name, kernel, "Autograd", with_keyset=True)
    return fn


@_autograd
def _autograd_round_clamp(keyset, op, args):
    w, scale, _, full, signed, covered, _ = args
    return list(_Quantizer.apply(keyset, op, args, full, signed, covered, None, *w, *scale))


@_autograd
def _autograd_msq(keyset, op, args):
    w, scale, _, k, full, covered, _ = args
    out = _Quantizer.apply(keyset, op, args, full, True, covered, k, *w, *scale)
    return list(out[:-3]), *out[-3:]


@_autograd
def _autograd_lsb_stats(keyset, op, args):
    w, scale, _, k, full, covered = args
    return _Quantizer.apply(keyset, op, args, full, True, covered, k, *w, *scale)


@_autograd
def _autograd_uniform_backward(keyset, op, args):
    grad, penalty, w = args[:3]
    out = _QuantizerBackward.apply(keyset, op, args, *grad, *([] if penalty is None else [penalty]))
    return list(out[: len(w)]), list(out[len(w):])


@_autograd
def _autograd_truncate(keyset, op, args):
    w, scale, out_scale = args[:3]
    return list(_Truncate.apply(keyset, op, args, *w, *scale, *out_scale))


@_autograd
def _autograd_truncate_backward(keyset, op, args):
    grads, w, scale, out_scale = args[:4]
    tanh, scale_grad = args[7], args[9]
    out = list(_TruncateBackward.apply(keyset, op, args, *grads, *(w if tanh else ())))
    n = len(w)
    return out[:n], out[n: 2 * n] if scale_grad else [], out[2 * n:] if scale_grad else []


@_autograd
def _autograd_categorical(keyset, op, args):
    x, alpha, sigma, _, gates, *_ = args
    return list(_Categorical.apply(keyset, op, args, *x, *alpha, *sigma, *gates))


@_autograd
def _autograd_categorical_backward(keyset, op, args):
    grad, x, alpha, sigma, _, gates, *_, scale_grad, gate_grad = args
    out = _CategoricalBackward.apply(keyset, op, args, *grad, *x, *alpha, *sigma, *gates)
    n, scales = len(x), len(x) if scale_grad else 0
    return list(out[:n]), list(out[n: n + scales]), list(out[n + scales: n + 2 * scales]), list(out[n + 2 * scales:])


# No gradient flows through these: their results never require grad.
for _op in ("absmax", "absmean", "round_clamp_out", "msq_out", "lsb", "add_lsb_grad_", "encode", "decode",
            *OPS["packing"]):
    _lib.impl(_op, torch.library.fallthrough_kernel, "Autograd")


def call(op, *args):
    """``op(*args)``, past autograd's Python kernel (8 us) where no argument wants a gradient."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)
