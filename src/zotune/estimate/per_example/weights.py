"""Each example alone meets its own perturbed weights, x + a u_g, in one forward pass.

The rows run as copies of the computation (`zotune.estimate.copies`): torch follows through each operation what differs
between the rows, so that the loss of an example depends on its own direction alone by construction. A layer's product
with W is taken once for all rows. What a direction adds to it depends on its kind:

    low rank      a (x B) Aᵀ, two thin products a group
    sign-flipped  a ((x ⊙ s) Uᵀ) ⊙ r, one more product with a matrix, whatever the number of groups
    dense         each row's product with its own matrix: for small tuned tensors, such as an adapter's
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from zotune import noise
from zotune.directions.direction import Direction
from zotune.directions.flipped import FlippedSampler
from zotune.directions.low_rank import linear
from zotune.directions.samplers import Factors
from zotune.errors import UsageError, is_out_of_memory
from zotune.estimate.batched_probes import NotSeparableError, copied
from zotune.estimate.copies import is_innermost, with_copies
from zotune.estimate.perturb import OffsetAlong, nbytes, piece_elements, pieces
from zotune.model import matmul as gemm
from zotune.model.parameters import ParameterSet, TunedTensor
from zotune.system import limits

# On a CPU: rows of a matrix that are moved at a time, and rows of a share from which on they cost less than a second
# product of all rows, as measured.
_PIECE_ROWS, _OWN_ROWS = 256, 48


def _takes_own_matrices(x: Tensor, weight: Tensor) -> bool:
    """Whether each share's rows of x (shares, rows, n) are multiplied by a matrix of its own."""
    plain = type(x) is Tensor and weight.dtype == x.dtype and x.dtype not in noise.HALF
    return plain and x.is_cpu and weight.is_cpu and x.shape[1] >= _OWN_ROWS and not torch.is_grad_enabled()


class each_alone(copied):  # noqa: N801 - named as `perturbed_by`
    """Each row of a batch at its own perturbed weights; an `EachRow`.

    Args:
        tuned: the tuned tensors of a model.
        directions: u_g of each group, over the same tensors.
        groups: the group of each example.
        points: the distances a.

    Attributes:
        bytes_of_copies: of the tensors that each group has a copy of.

    Raises:
        UsageError: copies of tensors, one a group, would take more than 256 MiB.
    """

    def __init__(
        self, tuned: ParameterSet, directions: Sequence[Direction], groups: Sequence[int], points: Sequence[float]
    ) -> None:
        super().__init__(tuned, directions[0].tensors, 0)
        if tuned.is_tensor_parallel:
            raise UsageError(
                "directions_per_batch gives each example weights of its own, which the processes of a tensor-parallel "
                "plan cannot exchange activations of. Leave it out, or shard the model by FSDP2."
            )
        self._directions, self._groups, self._points = directions, groups, points
        self._of_rows: Sequence[int] = ()
        whole = frozenset(t.id for t in tuned if t.id in self.chosen and not self._is_thin(t))
        self.bytes_of_copies = self._check_room(whole, len(set(groups)))

    def __call__(self, compute: Callable[..., Tensor], inputs: Sequence[Tensor], owners: Sequence[int]) -> Tensor:
        """As `EachRow`.

        Raises:
            UsageError: the computation has no meaning for each row alone.
            UnreadTensorError: a chosen tensor was not read.
        """
        num_points, num_rows = len(self._points), len(owners)
        self._copies = num_points * num_rows
        self._of_rows = [self._groups[owner] for owner in owners]

        def rows() -> Tensor:
            repeated = (x.repeat(num_points, *(1 for _ in x.shape[1:]))[:, None] for x in inputs)
            return compute(*(with_copies(x, self._level) for x in repeated))

        try:
            return self.evaluate(rows).view(num_points, num_rows, *self._shape)
        except NotSeparableError as error:
            cause = error.__cause__
            if isinstance(cause, UsageError | TypeError) or (cause is not None and is_out_of_memory(cause)):
                raise cause from None
            raise UsageError(
                f"one direction an example needs each example's loss without the others, which this objective does not "
                f"give: {error}. Leave directions_per_batch out."
            ) from cause

    def evaluate(self, objective: Callable[[], Tensor]) -> Tensor:
        """As `copied.evaluate`."""
        found = super().evaluate(objective)
        self._shape = found.shape[1:]
        return found

    def _is_thin(self, tensor: TunedTensor) -> bool:
        """Whether products with a tensor need no copies of it."""
        u = self._directions[0]
        return u.has_factors(tensor.id) or isinstance(u.sampler_of(tensor.id), FlippedSampler)

    def _check_room(self, ids: frozenset[int], num_groups: int) -> int:
        needed = nbytes(self.tuned, ids) * num_groups * len(self._points) if ids else 0
        if needed > limits.EXAMPLE_BYTES:
            raise UsageError(
                f"{num_groups} directions would take {needed >> 20} MiB of copies of what they move, more than "
                f"{limits.EXAMPLE_BYTES >> 20} MiB. Linear layers and embeddings need none with directions of low rank "
                "(zotune.low_rank, --rank 1) or sign-flipped ones (zotune.flipped, --flipped); else tune fewer "
                "numbers, or take fewer directions."
            )
        return needed

    def _perturbed(self, tensor: TunedTensor, value: Tensor) -> Tensor:
        """As `copied._perturbed`: made once a group and point."""
        used = sorted(set(self._of_rows))
        # A matrix that is read by something other than a layer has to be made whole.
        self._check_room(frozenset([tensor.id]), len(used))
        source = value.detach().contiguous().view(-1)
        moved = source.new_empty((len(self._points), len(used), source.numel()))
        is_plain = tensor.shard is None and not self._directions[0].has_factors(tensor.id)
        if is_plain and source.dtype in (torch.float32, torch.float64):
            self._add_at_once(moved, source, tensor, used)
        else:
            for outs, a in zip(moved, self._points, strict=True):
                for out, group in zip(outs, used, strict=True):
                    OffsetAlong(self._directions[group], a).move(out, source, tensor, 0)
        place = {group: i for i, group in enumerate(used)}
        index = torch.tensor([place[group] for group in self._of_rows], device=source.device)
        return moved[:, index].view(self._copies, *value.shape)

    def _add_at_once(self, moved: Tensor, source: Tensor, tensor: TunedTensor, used: Sequence[int]) -> None:
        """As `OffsetAlong.move` of each group at each point, with each direction made but once."""
        along = source.new_empty((len(used), source.numel()), dtype=torch.float32)
        for out, group in zip(along, used, strict=True):
            u = self._directions[group]
            u.sampler.fill(out, u.seed, tensor.id, 0)
        for outs, a in zip(moved, self._points, strict=True):
            torch.add(source, along.to(source.dtype) * torch.tensor(a, dtype=source.dtype), out=outs)

    def _own_product(
        self, x: Tensor, tensor: TunedTensor, weight: Tensor, bias: Tensor | None, own: Tensor | None
    ) -> Tensor | None:
        """As `copied._own_product`."""
        u = self._directions[0]
        if u.has_factors(tensor.id):
            self.note(tensor)
            return self._thin_product(x, tensor, weight, bias, own)
        if isinstance(sampler := u.sampler_of(tensor.id), FlippedSampler):
            self.note(tensor)
            return self._flipped_product(x, tensor, sampler, weight, bias, own)
        self.note(tensor)
        each = own.unsqueeze(1) if own is not None else None if bias is None else bias.view(1, 1, -1)
        return gemm.products(x, self._perturbed(tensor, weight), each)

    def _shares(self) -> list[tuple[float, int]]:
        """The point and the group of each of equal shares of the rows; of whole groups where they are equally large."""
        size = len(self._of_rows) // max(1, len(set(self._of_rows)))
        firsts = self._of_rows[::size]
        groups = firsts if [g for g in firsts for _ in range(size)] == list(self._of_rows) else self._of_rows
        return [(a, group) for a in self._points for group in groups]

    def _thin_product(
        self, x: Tensor, tensor: TunedTensor, weight: Tensor, bias: Tensor | None, own: Tensor | None
    ) -> Tensor:
        drawn: dict[int, Factors] = {}
        shares = self._shares()
        for group in {group for _, group in shares}:
            found = self._directions[group].factors(tensor.id, weight.device)
            assert found is not None
            drawn[group] = found
        rounding = {group: (self._directions[group].seed, tensor.id) for group in drawn}
        factors = [Factors(drawn[g].left, drawn[g].right, a, rounding[g]) for a, g in shares]
        return linear(x, weight, bias, factors, self._of_shares(own, len(shares)))

    def _of_shares(self, own: Tensor | None, num_shares: int) -> Tensor | None:
        """What each share adds to its products, of what each copy adds: the same within a share."""
        return None if own is None else own.view(num_shares, -1, own.shape[-1])[:, 0]

    def _flipped_product(
        self,
        x: Tensor,
        tensor: TunedTensor,
        sampler: FlippedSampler,
        weight: Tensor,
        bias: Tensor | None,
        own: Tensor | None,
    ) -> Tensor:
        shares = self._shares()
        columns = weight.shape[1]
        signs = {g: sampler.signs(self._directions[g].seed, tensor.id, x.device) for g in {g for _, g in shares}}
        dtype = noise.compute_dtype(x.dtype)
        r, s = (torch.stack([signs[g][side].to(dtype) for _, g in shares]) for side in (0, 1))
        r *= torch.tensor([a for a, _ in shares], dtype=dtype, device=x.device)[:, None]
        rows = x.reshape(len(shares), -1, columns)
        if _takes_own_matrices(rows, weight):
            return self._own_matrices(rows, tensor, sampler, weight, (r, s), self._added(bias, own, len(shares)))
        out = gemm.linear(rows, weight, bias)
        if (biases := self._of_shares(own, len(shares))) is not None:
            out += biases[:, None]
        turned = (rows * s[:, None].to(x.dtype)).reshape(-1, columns)
        most = piece_elements(weight.device.type)
        for lo, hi in pieces(weight.shape, max(most, columns)):
            u = sampler.shared(x.new_empty((hi - lo) * columns, dtype=torch.float32), tensor.id, lo * columns)
            product = F.linear(turned, u.view(-1, columns).to(x.dtype)).view(len(shares), -1, hi - lo)
            self._add(out[..., lo:hi], product, r[:, None, lo:hi], shares, tensor, lo)
        return out.view(self._copies, -1, weight.shape[0])

    def _added(self, bias: Tensor | None, own: Tensor | None, num_shares: int) -> Tensor | None:
        """What is added to each share's products: (shares or 1, 1, outputs)."""
        each = self._of_shares(own, num_shares)
        return bias if each is None else each[:, None] if bias is None else each[:, None] + bias

    def _own_matrices(
        self,
        x: Tensor,
        tensor: TunedTensor,
        sampler: FlippedSampler,
        weight: Tensor,
        signs: tuple[Tensor, Tensor],
        added: Tensor | None,
    ) -> Tensor:
        """Products of each share's rows (shares, rows, n) with a matrix of its own, W + U ⊙ (a r sᵀ), in pieces.

        A piece stays in the processor's cache, where making it costs less than a second product of all rows.
        """
        r, s = signs
        out, columns = x.new_empty((*x.shape[:-1], weight.shape[0])), weight.shape[1]
        scratch = x.new_empty((_PIECE_ROWS, columns))
        for lo in range(0, weight.shape[0], _PIECE_ROWS):
            hi = min(lo + _PIECE_ROWS, weight.shape[0])
            u = sampler.shared(x.new_empty((hi - lo) * columns, dtype=torch.float32), tensor.id, lo * columns)
            u, moved = u.view(-1, columns).to(x.dtype), scratch[: hi - lo]
            for rows, to, r_of, s_of in zip(x, out[..., lo:hi], r, s, strict=True):
                torch.mul(u, s_of, out=moved)
                torch.addcmul(weight[lo:hi], moved, r_of[lo:hi, None], out=moved)
                torch.mm(rows, moved.t(), out=to)
        if added is not None:
            out += added
        return out.view(self._copies, -1, weight.shape[0])

    def _add(
        self, out: Tensor, product: Tensor, r: Tensor, shares: Iterable[tuple[float, int]], tensor: TunedTensor, lo: int
    ) -> None:
        """Add r ⊙ product to some columns of each share; half precision is rounded at random, without bias."""
        if out.dtype not in noise.HALF:
            out.addcmul_(product, r)
            return
        y = torch.addcmul(out.float(), product.float(), r)
        for (_, group), own, rounded in zip(shares, y, out, strict=True):
            found = torch.empty_like(own, dtype=out.dtype)
            seed, start = self._directions[group].seed, lo * len(own)
            noise.round_to(found.view(-1), own.view(-1), seed, tensor.id, start, noise.PROBE)
            rounded.copy_(found)

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | None:
        tensor = self.find(weight)
        if tensor is None or max_norm is not None or not is_innermost(self._level):
            return None
        indices = self._stacked(input)
        if indices is None:
            indices = input.expand(self._copies, *input.shape)
        flat, at = indices.reshape(self._copies, -1), [(a, group) for a in self._points for group in self._of_rows]
        rows = F.embedding(flat, weight.detach())
        if isinstance(sampler := self._directions[0].sampler_of(self.note(tensor).id), FlippedSampler):
            self._flipped_rows(rows, flat, tensor, sampler, at)
        else:
            for own, index, (a, group) in zip(rows, flat, at, strict=True):
                OffsetAlong(self._directions[group], a).move_rows(own, index, tensor)
        return with_copies(rows.view(*indices.shape, weight.shape[1]), self._level)

    def _flipped_rows(
        self,
        rows: Tensor,
        indices: Tensor,
        tensor: TunedTensor,
        sampler: FlippedSampler,
        at: Sequence[tuple[float, int]],
    ) -> None:
        """Add to each copy's rows of a matrix, in place, what its direction adds to the rows of these indices."""
        distinct, places = torch.unique(indices, return_inverse=True)
        u = sampler.shared_rows(distinct, tensor.id)
        for own, index, place, (a, group) in zip(rows, indices, places, at, strict=True):
            seed = self._directions[group].seed
            r, s = sampler.signs(seed, tensor.id, rows.device)
            y = own.to(noise.compute_dtype(own.dtype))
            noise.round_rows(own, y + (u[place] * s * r[index][:, None]).to(y.dtype) * a, index, seed, tensor.id)

    def _in_turn(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        """As `copied._in_turn`, for half precision; else `vmap` applies the factors of all rows at once."""
        halves = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dtype in noise.HALF)
        return None if next(halves, None) is None else super()._in_turn(function, *args, **kwargs)


each_alone.special = {**copied.special, F.embedding: each_alone._embedding}
