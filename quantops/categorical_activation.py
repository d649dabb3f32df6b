"""Categorical quantization of activations, which keeps two bits per element for the backward pass."""

from typing import Any

import torch

from quantops import checks
from quantops.autograd.common import call
from quantops.convert import check_choice, check_int
from quantops.library import ops
from quantops.positive import positive
from quantops.reference.categorical import GRADS, MAX_SOFT_BITS, MODES
from quantops.reference.uniform import acc_dtype
from quantops.sharded import by_parts, whole
from quantops.state import Settings

HARD = MODES.index("hard")


class CategoricalActivation(Settings, torch.nn.Module):
    """ReLU and unsigned categorical quantizer in one: q = alpha j, j = clamp(rint(x * (1/alpha)), 0, 2^bits - 1).

    alpha and sigma are learned as ``log_alpha`` and ``log_sigma`` (see quantops/positive.py). They start with the first
    batch, from its positive part h: alpha = 2 mean(h) / sqrt(2^bits - 1) (Esser et al. 2020), 1 where that is
    nothing to start from; sigma is a fraction of alpha. In DDP each process starts from its own batch, and DDP's
    broadcast of buffers makes these one: with broadcast_buffers=False, run a forward before the model is wrapped.

    What the backward pass needs. The exact gradients of :func:`quantops.categorical` need x, which nothing else in a
    network keeps: 32 bits per element. What the next layer (a convolution, a linear layer) keeps is q, hence j. With
    two bits more, the quarter of its cell that x lies in, x is known to alpha/8, and the gradients are those of
    ``categorical`` with ``grad`` at

        x' = alpha (j + (k - 3/2)/4),  k = clamp(floor(4 (x/alpha - j)) + 2, 0, 3)

    but for k = 0 at j = 0 (x below -alpha/4) and k = 3 at the last j (x more than alpha/4 above it), which count as
    infinitely far: there dL/dx = 0 and dL/dalpha = g j. So they are not the exact gradients, but those of an x rounded
    to a grid four times as fine; q is exact. One pass reads x and writes q and the two bits; another reads dL/dq, q and
    the two bits, and looks up the factors of the few x' that there are. A plain clipped STE would take one bit for
    dL/dx, but its dL/dalpha needs q - x as well. Where no layer keeps q, this module does. sigma below alpha/10 makes
    x' too coarse: the mean of dL/dx over a cell then falls short. A q of bfloat16 with 8 bits does not tell
    neighbouring j from 128 on apart: x' may then lie in the neighbour's cell.

    Args:
        bits: 1..8. grad: "soft" or "winner". sigma: sigma/alpha at the start.

    x: any shape, float32, bfloat16, float16 or float64; q has its dtype, under autocast the autocast dtype. Errors name
    the argument. In-place changes of q before the backward pass raise, as autograd has it.
    """

    alpha_start: torch.Tensor
    bits: torch.Tensor

    def __init__(
        self,
        bits: int = 4,
        *,
        grad: str = "soft",
        sigma: float = 0.5,
        device: Any = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> None:
        super().__init__()
        check_int("bits", bits, 1, MAX_SOFT_BITS)
        check_choice("grad", grad, GRADS)
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 2.0**-24 < sigma < 2.0**24:
            raise ValueError(f"sigma: expected a number in (6e-08, 1.7e+07), got {sigma!r}")
        self.grad, self.ratio = grad, sigma
        made = {"device": device, "dtype": acc_dtype(dtype)}
        self.register_constants(device, bits=[bits])
        self.write()
        self.register_buffer("alpha_start", torch.zeros(1, **made))  # 0 until the first batch
        self.log_alpha = torch.nn.Parameter(torch.zeros(1, **made))
        self.log_sigma = torch.nn.Parameter(torch.zeros(1, **made))
        self.highest, self.started = 2**bits - 1, False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """q of x."""
        checks.tensors("x", [x])
        if not torch.compiler.is_compiling() and self.versions() != self.noted:
            self.check_written()
        if x.is_meta or self.alpha_start.is_meta:
            checks.all_or_none_on_meta({"x": x, "alpha": self.alpha_start})
        elif not self.started:
            if x.numel() == 0:  # as of an expert without tokens: the next batch will start it
                return x.to(checks.dtype_of(None, [x]))
            self._start(x)
        acc = acc_dtype(x.dtype)
        alpha = positive(self.alpha_start, self.log_alpha).to(acc)
        sigma = positive(self.alpha_start * self.ratio, self.log_sigma).to(acc)
        grad_of, dtype = GRADS.index(self.grad), checks.dtype_of(None, [x])

        def quantized(x, alpha, sigma):
            if torch.is_grad_enabled() and any(t.requires_grad for t in (x, alpha, sigma)):
                return call(ops.categorical_activation, x, alpha, sigma, self.bits, grad_of, dtype)[0]
            return call(ops.categorical, [x], [alpha], [sigma], self.bits, None, None, HARD, grad_of, False, dtype)[0]

        return by_parts(quantized, x, alpha, sigma)

    @torch.no_grad()
    def _start(self, x):
        mean = whole(x).to(self.alpha_start.dtype).clamp(min=0).mean()
        usable = (mean > 0) & (mean < torch.inf)
        start = torch.where(usable, 2 * mean / self.highest**0.5, 1.0).reshape(1)
        # A copy whose buffers are those of a module that has begun (an average of models) keeps what it was given.
        self.alpha_start.copy_(torch.where(self.alpha_start > 0, self.alpha_start, start))
        self.started = True

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.started = not self.alpha_start.is_meta and bool(self.alpha_start > 0)

    def settings(self) -> dict[str, Any]:
        return {"method": "cpq activation", "bits": self.highest.bit_length()}

    def training_settings(self) -> dict[str, Any]:
        return {"grad": self.grad, "sigma": self.ratio}

    def report(self) -> tuple[Any, ...]:
        """(bits, signed, end of the grid, part below 0), see :class:`quantops.report.ActivationBits`."""
        end = float(positive(self.alpha_start, self.log_alpha)) * self.highest if self.started else float("nan")
        return self.highest.bit_length(), False, end, 0.0

    def extra_repr(self) -> str:
        return f"bits={self.highest.bit_length()}, grad={self.grad!r}"
