"""Objectives small enough to be held against `zotune.reference`: a module, its closure, and f of a whole vector.

f is made from its own double-precision copy of the module, into which the vector is written, so it shares
nothing with the way in which the package displaces weights.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding, linear, rms_norm, scaled_dot_product_attention

DIMENSION = 7
_RANDOM = np.random.default_rng(0)
HESSIAN = torch.from_numpy((lambda m: m @ m.T / DIMENSION + np.eye(DIMENSION))(_RANDOM.normal(size=(DIMENSION,) * 2)))
LINEAR = torch.from_numpy(_RANDOM.normal(size=DIMENSION))


class Vector(nn.Module):
    """x ∈ R⁷ in two tensors, a matrix and a vector, and a function of it."""

    def __init__(self, function):
        super().__init__()
        start = torch.linspace(-1, 1.5, DIMENSION, dtype=torch.float64)
        self.first, self.second = nn.Parameter(start[:4].view(2, 2).clone()), nn.Parameter(start[4:].clone())
        self._function = function

    def forward(self):
        return self._function(torch.cat([self.first.flatten(), self.second]))


def quadratic(x):
    return x @ HESSIAN.to(x.dtype) @ x / 2 + LINEAR.to(x.dtype) @ x


def rosenbrock(x):
    return (10 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum() / 10


class Layer(nn.Module):
    """Causal attention and a feed-forward network, each behind a norm and with a residual connection."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.Parameter(1 + torch.randn(width) / 10)
        self.self_attn = nn.Linear(width, 3 * width)
        self.mlp_up, self.mlp_down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, h):
        parts = self.self_attn(rms_norm(h, h.shape[-1:], self.norm)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts)
        h = h + scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return h + self.dropout(self.mlp_down(torch.tanh(self.mlp_up(h))))


class Transformer(nn.Module):
    """A language model of a few layers whose embedding is also its head."""

    IDS = torch.tensor([[1, 5, 5, 9, 2], [10, 0, 7, 3, 4]])

    def __init__(self, layers=2, width=6, words=11):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Parameter(torch.randn(words, width) / 2)
        self.layers = nn.ModuleList([Layer(width) for _ in range(layers)])
        self.final_norm = nn.Parameter(torch.ones(width))

    def forward(self, ids=IDS):
        h = embedding(ids[:, :-1], self.embed)
        for layer in self.layers:
            h = layer(h)
        logits = linear(rms_norm(h, h.shape[-1:], self.final_norm), self.embed)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return cross_entropy(logits.flatten(0, 1).to(wide), ids[:, 1:].flatten())


@dataclass(frozen=True)
class Problem:
    """A module whose forward is its loss, and what is known of it in double precision."""

    model: nn.Module

    def closure(self):
        """The loss of the model as it is."""
        value = self.model()
        return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value

    @torch.no_grad()
    def value(self):
        """The loss in eval mode."""
        training = self.model.training
        loss = float(self.model.eval()())
        self.model.train(training)
        return loss

    def position(self):
        """x as one vector in double precision."""
        return np.concatenate([p.detach().double().flatten().numpy() for p in self.model.parameters()])

    def whole(self, part_of):
        """One vector from `part_of(model, name)`: of a direction or of an estimate."""
        parts = [part_of(self.model, name) for name, _ in self.model.named_parameters()]
        return np.concatenate([part.double().flatten().numpy() for part in parts])

    def vector(self, **of):
        """A vector that is constant on each tensor: the given values by (mangled) name prefix, 0 elsewhere."""
        return self.whole(
            lambda model, name: torch.full_like(
                model.get_parameter(name), next((v for k, v in of.items() if name.startswith(k)), 0.0)
            ).detach()
        )

    def plain(self):
        """f: x (NumPy, double) → the loss of a double-precision copy at x; ∇f likewise."""
        twin = copy.deepcopy(self.model).double().eval()

        def place(x):
            # A copy of one's own: parameters must not become views of the caller's array.
            nn.utils.vector_to_parameters(torch.from_numpy(x.copy()), twin.parameters())

        def f(x):
            place(x)
            with torch.no_grad():
                return float(twin())

        def gradient(x):
            place(x)
            parts = torch.autograd.grad(twin(), list(twin.parameters()))
            return torch.cat([part.flatten() for part in parts]).numpy()

        return f, gradient


PROBLEMS = {
    "quadratic": lambda: Vector(quadratic),
    "rosenbrock": lambda: Vector(rosenbrock),
    "transformer": Transformer,
}


def problem(name, dtype=torch.float64):
    """A fresh one of `PROBLEMS`."""
    return Problem(PROBLEMS[name]().to(dtype))


def bits(t):
    """The bits of a tensor, for comparisons that tell 0 from -0 and NaN from nothing."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8).clone()


def all_bits(model):
    """By name, the bits of everything that a model stores."""
    return {name: bits(t) for name, t in model.state_dict().items()}


def assert_same_bits(one, other):
    """Two models, or two results of `all_bits`."""
    one, other = (found if isinstance(found, dict) else all_bits(found) for found in (one, other))
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def assert_all_moved(before, model):
    """Every tensor's bits differ from those of `all_bits` before."""
    after = all_bits(model)
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not same, same
