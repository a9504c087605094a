"""A layer is left out only if its output is all it gives: other effects are found, and estimates are the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import zotune as zo
from zotune.model.effects import effect_of_layers

X = torch.linspace(-1, 1, 12).view(3, 4).double()


class Layer(nn.Module):
    """A layer that does `also` besides computing its output."""

    def __init__(self, also, index):
        super().__init__()
        self.linear, self.also, self.index, self.calls = nn.Linear(4, 4), also, index, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, h, shared):
        self.calls += 1
        inner = torch.tanh(self.linear(h))
        return self.also(self, inner, inner + h, shared)


class Model(nn.Module):
    def __init__(self, also, finish):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(also, i) for i in range(3)])
        self.finish, self.head = finish, nn.Linear(4, 1)
        self.double()

    def forward(self):
        shared, h = {"made": [], "buffer": torch.zeros(3, 4).double()}, X
        for layer in self.layers:
            h = layer(h, shared)
        return self.head(h).square().sum() + self.finish(self, shared)


def put(layer, name, value, output):
    setattr(layer, name, value)
    return output


def append(made, value, output):
    made.append(value)
    return output


def hand_on(layer, inner, output, shared):
    """As a position bias that the first layer makes for all."""
    if layer.index == 0:
        shared["bias"] = inner.mean(0)
    return output + shared["bias"]


def write(layer, inner, output, shared):
    shared["buffer"] += inner
    return output


def average(layer, inner, output, shared):
    layer.seen.copy_(inner.mean())
    return output


def stash_output(layer, inner, output, shared):
    shared["made"].append(output)
    return output


# What a layer does besides, what the model makes of it, and a word of the message; None where it is no effect.
EFFECTS = {
    "nothing": (lambda layer, inner, out, shared: out, lambda m, s: 0.0, None),
    "an attribute that is not used": (lambda layer, i, o, s: put(layer, "last", i, o), lambda m, s: 0.0, None),
    "a tuple": (lambda layer, i, o, s: o, lambda m, s: m.head.weight.sum(), None),
    "an attribute": (
        lambda layer, i, o, s: put(layer, "aux", i.square().mean(), o),
        lambda m, s: sum(layer.aux for layer in m.layers),
        "is used after it",
    ),
    "its output as an attribute": (
        lambda layer, i, o, s: put(layer, "aux", o, o),
        lambda m, s: m.layers[0].aux.square().sum(),
        "is used after it",
    ),
    "a number": (
        lambda layer, i, o, s: put(layer, "loss", float(i.mean()), o),
        lambda m, s: m.layers[0].loss,
        "numbers out of a tensor",
    ),
    "a flag": (
        lambda layer, i, o, s: put(layer, "flag", bool(i.mean() > 0.05), o),
        lambda m, s: float(sum(layer.flag for layer in m.layers)),
        "numbers out of a tensor",
    ),
    "a name": (lambda layer, i, o, s: put(layer, "name", "run", o), lambda m, s: len(m.layers[0].name), "attribute"),
    "a list": (lambda layer, i, o, s: append(s["made"], i, o), lambda m, s: torch.stack(s["made"]).sum(), "is used"),
    "its output in a list": (stash_output, lambda m, s: s["made"][0].sum(), "is used after it"),
    "what it hands on": (hand_on, lambda m, s: 0.0, "is used after it"),
    "a write": (write, lambda m, s: s["buffer"].square().sum(), "writes into"),
    "a running mean": (average, lambda m, s: m.layers[0].seen, "writes into"),
    "chance": (
        lambda layer, i, o, s: o + 0 * torch.rand(1),
        lambda m, s: torch.manual_seed(7).initial_seed() + 0 * torch.rand(1).sum(),
        "random numbers",
    ),
}


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", EFFECTS)
@pytest.mark.parametrize("difference", [zo.central_difference, zo.forward_difference])
def test_estimates_are_those_without_reuse(name, difference, capsys):
    also, finish, word = EFFECTS[name]
    found = []
    for reuse in (False, True):
        model = Model(also, finish)
        opt = zo.zo_sgd(model, 0.01, blocks=zo.blocks_by_layer(model), reuse_prefix=reuse, difference=difference)
        for _ in range(2):
            opt.step(lambda m=model: m().sum(), inspect=found.append)
    assert [e.terms for e in found[:2]] == [e.terms for e in found[2:]]
    said = capsys.readouterr().err
    assert said.count("no activations are reused") == (word is not None)
    assert word is None or word in said


def test_hooks_of_a_layer_run_once_on_its_output_and_those_inside_it_are_an_effect(capsys):
    def estimate(reuse, register):
        model = Model(*EFFECTS["nothing"][:2])
        seen = register(model)
        opt = zo.zo_sgd(model, 0.0, blocks=zo.blocks_by_layer(model), reuse_prefix=reuse)

        def loss():
            seen.clear()
            return model().sum() + sum(h.sum() for h in seen)

        return opt.estimate(loss).terms

    def steer(model):
        model.layers[0].register_forward_hook(lambda module, args, output: output + 1)
        model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
        return []

    def collect_inside(model):
        seen = []
        model.layers[0].linear.register_forward_hook(lambda module, args, output: seen.append(output))
        return seen

    def collect_outputs(model):
        seen = []
        model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
        return seen

    for register, is_effect in ((steer, False), (collect_outputs, False), (collect_inside, True)):
        assert estimate(False, register) == estimate(True, register)
        assert ("no activations are reused" in capsys.readouterr().err) == is_effect


def test_of_a_group_of_layers_only_the_last_output_may_be_used_after_it():
    def effect(finish, depth=2):
        model = Model(EFFECTS["nothing"][0], lambda m, s: 0.0)
        outputs = []
        for layer in model.layers:
            layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        return effect_of_layers(model, model.layers[:depth], lambda: model() + finish(outputs), lambda o: o)

    assert effect(lambda outputs: 0) is None
    assert effect(lambda outputs: outputs[1].sum()) is None
    assert effect(lambda outputs: outputs[2].sum()) is None
    assert "is used after it" in effect(lambda outputs: outputs[0].sum())
    assert effect(lambda outputs: F.relu(outputs[0]).sum(), depth=1) is None
