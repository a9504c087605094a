"""Train a neural network on real data with each of the methods, each with the same number of forward passes.

The data are film reviews with their sentiment (SST-2), as bags of words. Back-propagation is added for comparison. A
pass that also computes a derivative, forward or backward, counts as one pass, although it takes longer.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from zotune.methods.paper import METHODS

DATA = Path(__file__).parents[1] / "data" / "sst2"
NUM_WORDS, NUM_HIDDEN, NUM_FORWARDS = 300, 8, 800
# Round numbers, not tuned; all other methods have the rate 0.3, and all but two of these take two directions a step.
OPTIONS = {
    "zo_sgd_sign": {"lr": 0.02},
    "zo_sgd_mmt": {"lr": 0.03},
    "zo_adam": {"lr": 0.02},
    "fzoo": {"lr": 0.002, "num_queries": 8},
    "randopt": {"lr": 0.05, "mu": 0.05, "num_queries": 16},
    "zo_muon": {"lr": 0.1, "vector_lr": 0.3},
    "mopi": {"lr": 0.03, "vector_lr": 0.3},
}


def reviews(name: str) -> tuple[list[list[str]], Tensor]:
    """Return the words of each review, and the labels: 1 for a good film, 0 for a bad one."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["sentence"].split() for row in rows], torch.tensor([row["label"] for row in rows])


def bags(texts: list[list[str]], words: list[str]) -> Tensor:
    """Return 1 where a text contains a word and 0 elsewhere: shape (texts, words)."""
    return torch.tensor([[float(word in text) for word in words] for text in map(set, texts)])


def network() -> nn.Module:
    """Return the network, with the same initial weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(NUM_WORDS, NUM_HIDDEN), nn.Tanh(), nn.Linear(NUM_HIDDEN, 2))


texts, y = reviews("train")
validation_texts, validation_y = reviews("validation")
words = [word for word, _ in Counter(word for text in texts for word in dict.fromkeys(text)).most_common(NUM_WORDS)]
x, validation_x = bags(texts, words), bags(validation_texts, words)
print(f"{len(x)} reviews to train on, {len(validation_x)} to validate, {NUM_WORDS} words\n")
print(f"{'method':16} steps   passes   loss   accuracy, in training and on validation rows")


@torch.no_grad()
def report(name: str, model: nn.Module, num_steps: int, num_forwards: int) -> float:
    """Print a line of the table and return the training loss."""
    loss = cross_entropy(model(x), y).item()
    accuracies = [(model(a).argmax(1) == b).float().mean().item() for a, b in ((x, y), (validation_x, validation_y))]
    print(f"{name:16} {num_steps:5d} {num_forwards:8d}   {loss:.3f}   {accuracies[0]:.1%}   {accuracies[1]:.1%}")
    return loss


untrained = report("untrained", network(), 0, 0)
for name, method in METHODS.items():
    model = network()
    optimizer = method(model, **{"lr": 0.3, "num_queries": 2, **OPTIONS.get(name, {})})
    while optimizer.num_forwards < NUM_FORWARDS:
        optimizer.step(lambda model=model: cross_entropy(model(x), y))
    assert report(name, model, optimizer.num_steps, optimizer.num_forwards) < untrained - 0.05

model = network()
adam = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(30):
    adam.zero_grad()
    cross_entropy(model(x), y).backward()
    adam.step()
report("back-prop.", model, 30, 30)
