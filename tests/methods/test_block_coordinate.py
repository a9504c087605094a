"""Block-coordinate descent over parameters in any form that torch's optimizers take."""

import pytest
import torch
from torch import nn

import zotune as zo

FORMS = {
    "iterator": lambda m: m.parameters(),
    "group of an iterator": lambda m: [{"params": m.parameters()}],
    "pairs of names and parameters": lambda m: m.named_parameters(),
    "groups of tensors": lambda m: [{"params": p} for p in m.parameters()],
}


@pytest.mark.parametrize("form", FORMS)
def test_parameters_are_the_same_in_every_form(form):
    models = []
    for given in (FORMS[form], lambda m: list(m.parameters())):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
        opt = zo.block_coordinate(model, lr=0.1, choice="cyclic", params=given(model))
        for _ in range(2):
            opt.step(lambda m=model: m(torch.ones(2, 3)).square().sum())
        models.append(model)
    assert all(map(torch.equal, *(m.parameters() for m in models)))
