"""Products and orthonormal columns with the same bits on every machine, for any number of threads.

A matrix product adds in an order that libraries choose, so its last bits differ. Where all partial sums are exact, no
order matters: factors are cut into slices of so few bits that a sum of their products fits into a double (the scheme of
Ozaki et al., 2012, for exact products). Everything else here is element-wise arithmetic in double precision, which is
rounded alike everywhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Squares, relative to that of a whole, of what is rounding alone: of what is left of a column that depends on others,
# and of a product.
_DEPENDENT, _ROUNDING = 1e-20, 1e-22


def portable_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product a b in double precision, to some 12 digits of max |a| max |b|: (m, k) by (k, n) to (m, n).

    >>> a = torch.randn(3, 40, dtype=torch.float64)
    >>> bool((portable_matmul(a, a.t()) - a @ a.t()).abs().max() < 1e-9)
    True
    >>> torch.equal(portable_matmul(a, a.t()), portable_matmul(a.flip(1), a.flip(1).t()))
    True
    """
    bits = (53 - (a.shape[1] - 1).bit_length()) // 2
    (a_high, a_low, a_power), (b_high, b_low, b_power) = _slices(a, bits), _slices(b, bits)
    low = (a_high @ b_low + a_low @ b_high) * 2.0**-bits
    return (a_high @ b_high + low) * 2.0 ** (a_power + b_power - 2 * bits)


def _slices(x: Tensor, bits: int) -> tuple[Tensor, Tensor, int]:
    """Integers of `bits` bits: x = (high + low 2^-bits) 2^(power - bits), but for what is below the bits of both."""
    x = x.double()
    _, power = math.frexp(float(x.abs().max()) if x.numel() else 0.0)
    scaled = x * 2.0 ** (bits - power)
    high = scaled.round()
    return high, ((scaled - high) * 2.0**bits).round(), power


def orthonormal(columns: Tensor) -> Tensor:
    """The Q of a QR decomposition whose R has a positive diagonal: (m, r) to (m, r), r ≤ m, in double precision.

    Of Gaussian columns it is uniform on all orthonormal ones (Haar). Gram and Schmidt's method, each column taken out
    of all that follow it; the columns must be independent.

    >>> q = orthonormal(torch.randn(7, 3))
    >>> bool(torch.allclose(q.t() @ q, torch.eye(3, dtype=torch.float64)))
    True
    """
    rows = columns.t().double().contiguous().clone()
    squares = []
    for k, own in enumerate(rows):
        products = _sum(own * rows[k:])
        squares.append(products[0])
        rows[k + 1 :] -= (products[1:] / products[0]).unsqueeze(1) * own
    return _normalised(rows, squares)


def is_orthonormal(columns: Tensor) -> bool:
    """Whether columns are orthonormal but for rounding; not where one that depended on others has none left."""
    one = torch.eye(columns.shape[1], dtype=columns.dtype, device=columns.device)
    return bool((columns.t() @ columns - one).abs().max() < 1e-6)


def orthonormal_from(columns: Tensor, spare: Tensor) -> Tensor:
    """As `orthonormal`, of columns of which some may depend on those before them: of `spare` others take their place.

    Args:
        columns: (m, r).
        spare: (m, r), independent of each other.

    >>> ones = torch.ones(2, 2)
    >>> orthonormal_from(ones, torch.eye(2)).round(decimals=3).tolist()
    [[0.707, 0.707], [0.707, -0.707]]
    """
    rows: list[Tensor] = []
    squares: list[Tensor] = []
    for own in (*columns.t().double(), *spare.t().double()):
        if len(rows) == columns.shape[1]:
            break
        rest = own
        for row, square in zip(rows, squares, strict=True):
            rest = rest - _sum((row * rest)[None]) / square * row
        before, after = (_sum(x.square()[None])[0] for x in (own, rest))
        if float(after) > _DEPENDENT * float(before):
            rows.append(rest)
            squares.append(after)
    return _normalised(torch.stack(rows), squares)


def _normalised(rows: Tensor, squares: list[Tensor]) -> Tensor:
    """Rows by the roots of their squares, as columns."""
    # The root of the processor is rounded to nearest, that of a vector library need not be.
    norms = [math.sqrt(square) for square in torch.stack(squares).tolist()]
    return (rows / torch.tensor(norms, dtype=torch.float64, device=rows.device).unsqueeze(1)).t().contiguous()


def normalised_columns(x: Tensor) -> Tensor:
    """Each column by its length, in double precision; one that is rounding of 0 beside the longest is 0."""
    squares = _sum(x.t().double().square()).tolist()
    least = _ROUNDING * max(squares)
    norms = [math.sqrt(square) if square > least else math.inf for square in squares]
    return x.double() / torch.tensor(norms, dtype=torch.float64, device=x.device)


def frobenius(x: Tensor) -> float:
    """The Frobenius norm, in double precision."""
    return math.sqrt(float(_sum(x.double().square().reshape(1, -1))))


def _sum(x: Tensor) -> Tensor:
    """The sums of the rows, in an order that depends on their length alone: halves are added until one number is
    left.
    """
    while (length := x.shape[1]) > 1:
        half = (length + 1) // 2
        head = x[:, :half].clone()
        head[:, : length - half] += x[:, half:]
        x = head
    return x[:, 0]
