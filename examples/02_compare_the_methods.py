"""A neural network on real data, by every method that there is, each with the same number of forward passes.

The data are film reviews with their sentiment (SST-2), as bags of words; back-propagation is beside them for scale. A
pass that also carries a derivative, forward or backward, counts as one, though it takes longer.
"""

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import zotune as zo

DATA = Path(__file__).parents[1] / "data" / "sst2"
NUM_WORDS, NUM_HIDDEN, NUM_FORWARDS = 300, 8, 800
# Round numbers, not tuned; 0.3 for all others.
LEARNING_RATES = {"zo_sgd_sign": 0.02, "zo_sgd_mmt": 0.03, "zo_adam": 0.02}


def reviews(name: str) -> tuple[list[list[str]], Tensor]:
    """Each review's words, and the labels: 1 for a good film, 0 for a bad one."""
    rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["sentence"].split() for row in rows], torch.tensor([row["label"] for row in rows])


def bags(texts: list[list[str]], words: list[str]) -> Tensor:
    """Which of the words each text has: shape (texts, words)."""
    return torch.tensor([[float(word in text) for word in words] for text in map(set, texts)])


def network() -> nn.Module:
    """The same network each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(NUM_WORDS, NUM_HIDDEN), nn.Tanh(), nn.Linear(NUM_HIDDEN, 2))


texts, y = reviews("train")
other_texts, other_y = reviews("validation")
words = [word for word, _ in Counter(word for text in texts for word in dict.fromkeys(text)).most_common(NUM_WORDS)]
x, other_x = bags(texts, words), bags(other_texts, words)
print(f"{len(x)} reviews to train on, {len(other_x)} to validate, {NUM_WORDS} words\n")
print(f"{'method':14} steps   passes   loss   accuracy, in training and on validation rows")


@torch.no_grad()
def report(name: str, model: nn.Module, num_steps: int, num_forwards: int) -> float:
    """Print a line of the table; the training loss."""
    loss = cross_entropy(model(x), y).item()
    accuracies = [(model(a).argmax(1) == b).float().mean().item() for a, b in ((x, y), (other_x, other_y))]
    print(f"{name:14} {num_steps:5d} {num_forwards:8d}   {loss:.3f}   {accuracies[0]:.1%}   {accuracies[1]:.1%}")
    return loss


untrained = report("untrained", network(), 0, 0)
for name, method in zo.METHODS.items():
    model = network()
    optimizer = method(model, lr=LEARNING_RATES.get(name, 0.3), num_queries=2)
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
