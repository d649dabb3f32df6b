"""The CUDA kernels of family ``own_scale`` equal the reference, bit for bit: the very source file, run on the CPU. See
emulation.py for the how.
"""

import itertools

import torch

from emulation import DTYPES, Program, exact, laid_out_like, raises, weights
from quantops import reference

program = Program(__file__, "own_scale")


@program.check
def test_backward():
    for dtype, per_row, mean in itertools.product(DTYPES, (False, True), (False, True)):
        w = [t for t in weights(dtype) if t.dim() or not per_row] * 5  # more than the table of a small launch
        reduce = reference.absmean if mean else reference.absmax
        s = [reduce(t, per_row=per_row) for t in w]
        g = [torch.randn(v.shape, dtype=v.dtype) for v in s]
        for i, got in enumerate(torch.ops.quantops.own_scale_backward(w, s, g, mean)):
            want = reference.own_scale_backward(w[i], s[i], g[i], mean=mean)
            exact(got, want, f"{dtype} per_row={per_row} mean={mean} w[{i}]")
            laid_out_like(got, w[i])


@program.check
def test_errors():
    op, w, one = torch.ops.quantops.own_scale_backward, [torch.randn(4, 6)], [torch.ones(())]
    raises(
        {
            "w: expected dtype float32": lambda: op([w[0].int()], one, one, False),
            "scale: expected one element or one per row (4)": lambda: op(w, [torch.ones(3)], one, False),
            "grad_scale: expected dtype float32, got float64": lambda: op(w, one, [one[0].double()], True),
            "grad_scale: expected as many elements as its scale has (1), got shape (4,)": lambda: op(
                w, one, [torch.ones(4)], True
            ),
        }
    )
