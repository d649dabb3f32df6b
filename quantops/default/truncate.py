"""Family ``truncate`` by the reference, weight by weight."""

from quantops import reference
from quantops.layout import laid_out
from quantops.reference.truncate import COMPANDINGS
from quantops.reference.uniform import RULES
from quantops.values import check_truncation


def truncate(w, scale, out_scale, bits, base_bits, rule, tanh, covered, exact, dtype):
    check_truncation(scale, out_scale, bits, base_bits)
    return [
        q
        for n in bits
        for q in laid_out(
            [
                reference.truncate(
                    t,
                    s,
                    m,
                    base_bits=base,
                    rule=RULES[rule],
                    companding=COMPANDINGS[tanh],
                    out_scale=out,
                    out_dtype=dtype,
                )
                for t, s, out, m, base in zip(w, scale, out_scale or [None] * len(w), n, base_bits.reshape(-1))
            ],
            w,
        )
    ]


def truncate_backward(grads, w, scale, out_scale, bits, base_bits, rule, tanh, covered, scale_grad):
    check_truncation(scale, out_scale, bits, base_bits)
    each = [
        reference.truncate_backward(
            used_gradients(grads[i :: len(w)], t),
            t,
            s,
            bits[:, i],
            base_bits=base,
            rule=RULES[rule],
            companding=COMPANDINGS[tanh],
            out_scale=out,
            covered=covered and not tanh and not scale_grad,
        )
        for i, (t, s, out, base) in enumerate(zip(w, scale, out_scale or [None] * len(w), base_bits.reshape(-1)))
    ]
    grad_w, grad_scale, grad_out_scale = map(list, zip(*each))
    return laid_out(grad_w, w), grad_scale if scale_grad else [], grad_out_scale if scale_grad and out_scale else []


def used_gradients(grads, w):
    """The gradients of one weight's widths as the reference takes them: None where there is none."""
    return [g if g.shape == w.shape else None for g in grads]
