"""Family ``categorical_activation`` by the reference, in the order of memory."""

from quantops import reference
from quantops.layout import dense, empty_like, in_layout_of, in_memory
from quantops.reference.categorical import GRADS
from quantops.values import check_categorical_activation


def categorical_activation(x, alpha, sigma, bits, grad_of, dtype):
    check_categorical_activation(alpha, sigma, bits)
    x = dense(x)
    values, quarters = reference.categorical_activation(in_memory(x), alpha, sigma, bits, out_dtype=dtype)
    q = empty_like(x, dtype)
    in_memory(q).copy_(values)
    return q, quarters


def categorical_activation_backward(grad, q, quarters, alpha, sigma, bits, grad_of, scale_grad, dtype):
    check_categorical_activation(alpha, sigma, bits)
    grad = in_layout_of(grad, q)
    values, *sums = reference.categorical_activation_backward(
        in_memory(grad), in_memory(q), quarters, alpha, sigma, bits, grad_of=GRADS[grad_of], dtype=dtype
    )
    grad_x = empty_like(q, dtype)
    in_memory(grad_x).copy_(values)
    return grad_x, sums if scale_grad else []
