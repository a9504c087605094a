"""Products of a batch with a layer's weights, where the library that computes them can be helped.

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

    >>> x, weight = torch.randn(4, 512, 768).bfloat16(), torch.randn(768, 768).bfloat16()
    >>> torch.allclose(linear(x, weight), F.linear(x, weight), rtol=0.01, atol=0.1)
    True
    """
    num_rows, columns = input.numel() // input.shape[-1], weight.shape[0]
    if not (columns in _COLUMNS and columns <= num_rows < 2 * columns and _takes_halves(input, weight)):
        return F.linear(input, weight, bias)
    out = input.new_empty((*input.shape[:-1], columns))
    halves = zip(input.reshape(num_rows, -1).tensor_split(2), out.view(num_rows, -1).tensor_split(2), strict=True)
    for rows, to in halves:
        if bias is None:
            torch.mm(rows, weight.t(), out=to)
        else:
            torch.addmm(bias, rows, weight.t(), out=to)
    return out


def _takes_halves(x: Tensor, weight: Tensor) -> bool:
    bfloat16 = x.device.type == weight.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    # Quantised weights are of a type that says it is of half precision, and whose products are its own.
    plain = type(weight) in (Tensor, nn.Parameter)
    return bfloat16 and plain and torch.get_num_threads() == 2 and not torch.is_grad_enabled()
