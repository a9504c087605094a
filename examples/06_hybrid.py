"""Tune the lower layers with forward passes and the upper layers with back-propagation, and measure the memory.

A small transformer learns to continue film reviews letter by letter. Back-propagation stores activations of every layer
that it reaches. The layers below the cut store none, and they are tuned all the same.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import zotune as zo

DATA = Path(__file__).parents[1] / "data" / "sst2" / "train.jsonl"
NUM_LAYERS, WIDTH, LENGTH, BATCH, NUM_STEPS = 4, 32, 32, 16, 30

text = "\n".join(json.loads(line)["sentence"] for line in DATA.read_text(encoding="utf-8").splitlines())
letters = sorted(set(text))
encoded = torch.tensor([letters.index(letter) for letter in text])


class LanguageModel(nn.Module):
    """A model from letters to scores of the next letter: an embedding, a stack of transformer layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(letters), WIDTH)
        self.positions = nn.Parameter(0.1 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(NUM_LAYERS)
        )
        self.head = nn.Linear(WIDTH, len(letters))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens of shape (batch, length) to scores of shape (batch, length, letters)."""
        h, mask = self.embedding(tokens) + self.positions, nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for layer in self.layers:
            h = layer(h, src_mask=mask, is_causal=True)
        return self.head(h)


def batch(step: int) -> Tensor:
    """Return random pieces of the text: shape (BATCH, LENGTH + 1)."""
    places = torch.randint(len(encoded) - LENGTH, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    return encoded[places + torch.arange(LENGTH + 1)]


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next letters."""
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def activation_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """Return the bytes that autograd saves for a backward pass of `run`, without parameters, each storage once."""
    sizes = {}

    def note(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for address, size in sizes.items() if address not in parameters)


print("layers by forward passes   KiB saved for the backward pass  loss of the last 5 steps")
torch.manual_seed(0)
model = LanguageModel()
saved = [activation_bytes(model, lambda: loss_of(model, batch(0)))]
print(f"{0:24d} {saved[0] / 1024:32.0f}   (back-propagation alone)")

for num_layers in range(1, NUM_LAYERS):
    torch.manual_seed(0)
    model = LanguageModel()
    shallow, deep = zo.split_at_layer(model, num_layers, lambda model=model: loss_of(model, batch(0)))
    optimizer = zo.Hybrid(zo.zo_sgd(model, lr=1e-3, params=shallow), torch.optim.Adam(deep, lr=3e-3))
    start, losses = [p.detach().clone() for p in shallow], []
    for step in range(NUM_STEPS):
        run = partial(optimizer.step, partial(loss_of, model, batch(step)))
        size = activation_bytes(model, lambda run=run, losses=losses: losses.append(run()))
    saved.append(size)
    print(f"{num_layers:24d} {size / 1024:32.0f} {sum(losses[-5:]) / 5:26.2f}, from {losses[0]:.2f}")
    assert all((p != x).any() for p, x in zip(shallow, start, strict=True))
    assert sum(losses[-5:]) / 5 < losses[0] - 1
assert saved == sorted(set(saved), reverse=True)
