"""Products of a batch with a layer's weights, arranged for the library that computes them.

oneDNN 3.12 (torch 2.13) gives a product of bfloat16 matrices to one thread of two where it has from n to 2n rows and n
columns, n up to about a thousand: at n = 768 these take twice the time a row that fewer or more rows take. A batch of
two copies of every example is more often there than the batch itself. Each half of such a product has both threads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Columns for which that was measured: with fewer, both halves are small and slow; with more, it does not happen.
_COLUMNS = range(384, 1153)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Y = x Wᵀ + b, as `torch.nn.functional.linear`, in halves where that is faster.

    >>> x, weight = torch.randn(2, 512, 768).bfloat16(), torch.randn(768, 768).bfloat16()
    >>> with torch.no_grad():
    ...     torch.allclose(linear(x, weight), F.linear(x, weight), rtol=0.02, atol=0.5)
    True
    """
    if not (_takes_halves(input, weight) and weight.shape[0] in _COLUMNS and input.shape[-1]):
        return F.linear(input, weight, bias)
    num_rows, columns = input.numel() // input.shape[-1], weight.shape[0]
    if not columns <= num_rows < 2 * columns:
        return F.linear(input, weight, bias)
    out = input.new_empty((*input.shape[:-1], columns))
    halves = zip(input.reshape(num_rows, -1).tensor_split(2), out.view(num_rows, -1).tensor_split(2), strict=True)
    for rows, to in halves:
        if bias is None:
            torch.mm(rows, weight.t(), out=to)
        else:
            torch.addmm(bias, rows, weight.t(), out=to)
    return out


def products(x: Tensor, weights: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each copy's (rows, in) times the transpose of its own (out, in), plus bias (copies or 1, 1, out): (copies, rows,
    out).
    """
    return torch.bmm(x, weights.mT) if bias is None else torch.baddbmm(bias, x, weights.mT)


def _takes_halves(x: Tensor, weight: Tensor) -> bool:
    # Quantised weights are of a type that says it is of half precision, and whose products are its own.
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2
    bfloat16 = plain and x.is_cpu and weight.is_cpu and x.dtype == weight.dtype == torch.bfloat16
    return bfloat16 and torch.get_num_threads() == 2 and not torch.is_grad_enabled()
