"""Family ``categorical`` by the reference, tensor by tensor."""

from quantops import reference
from quantops.layout import laid_out
from quantops.reference.categorical import GRADS, MODES
from quantops.values import check_categorical


def _each_categorical(x, alpha, sigma, bits, gates, seed, mode, signed):
    """Arguments and options of the reference for every tensor of the list, whose elements are numbered through."""
    counts = [t.numel() for t in x]
    for i, (t, a, s, n) in enumerate(zip(x, alpha, sigma, bits.reshape(-1))):
        yield (
            (t, a, s, n),
            dict(gates=gates[i] if gates else None, signed=signed, mode=MODES[mode], seed=seed, offset=sum(counts[:i])),
        )


def categorical(x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, dtype):
    check_categorical(alpha, sigma, bits, gates, seed, mode, grad_of)
    return laid_out(
        [
            reference.categorical(*args, **options, out_dtype=dtype)
            for args, options in _each_categorical(x, alpha, sigma, bits, gates, seed, mode, signed)
        ],
        x,
    )


def categorical_backward(grad, x, alpha, sigma, bits, gates, seed, mode, grad_of, signed, scale_grad, gate_grad):
    check_categorical(alpha, sigma, bits, gates, seed, mode, grad_of)
    each = [
        reference.categorical_backward(g, *args, **options, grad_of=GRADS[grad_of])
        for g, (args, options) in zip(grad, _each_categorical(x, alpha, sigma, bits, gates, seed, mode, signed))
    ]
    grad_x, grad_alpha, grad_sigma, grad_gates = map(list, zip(*each))
    return (
        laid_out(grad_x, x),
        grad_alpha if scale_grad else [],
        grad_sigma if scale_grad else [],
        grad_gates if gate_grad and gates else [],
    )
