"""Models for tests of shards, built alike in every process, and the ways to shard them."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import zotune as zo

VOCABULARY, WIDTH, INNER, TOKENS = 13, 10, 7, 5


class Layer(nn.Module):
    def __init__(self, width=WIDTH, inner=INNER):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Tied embeddings, norms, biases, and a tensor of three dimensions; no size that 2 or 3 divide but the width."""

    def __init__(self, width=WIDTH, inner=INNER, vocabulary=VOCABULARY):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width, inner), Layer(width, inner)])
        self.mix = nn.Conv1d(width, width, 1)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.mix(x.mT).mT)


def model(dtype=torch.float32, **sizes):
    torch.manual_seed(0)
    return Model(**sizes).to(dtype)


def batch(seed=1, rows=2, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def logits(m, tokens):
    found = m(tokens)
    return getattr(found, "logits", found)


def losses(m, tokens):
    return nn.functional.cross_entropy(logits(m, tokens)[:, :-1].mT.float(), tokens[:, 1:], reduction="none").mean(1)


def objective(m, tokens):
    return lambda: losses(m, tokens).mean()


def objective_of_examples(m, tokens):
    return zo.per_example(lambda t: losses(m, t), tokens)


# Ways to shard: each changes a model in place, over a mesh of all processes --------------------------------------


def fsdp(m, mesh):
    """A gather for each layer, and one for what is outside of them."""
    for layer in m.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(m, mesh=mesh)


def fsdp_by_columns(m, mesh):
    """As far as columns divide evenly, which FSDP2 asks for."""

    def place(p):
        return Shard(1) if p.dim() > 1 and p.shape[1] % mesh.size() == 0 else Shard(0)

    for layer in m.layers:
        fully_shard(layer, mesh=mesh, shard_placement_fn=place)
    return fully_shard(m, mesh=mesh, shard_placement_fn=place)


def tensor_parallel(m, mesh):
    """torch's own plan: rows and columns of each layer's matrices, and a norm that every process holds."""
    for layer in m.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()})
        layer.norm.weight = nn.Parameter(distribute_tensor(layer.norm.weight.detach(), mesh, [Replicate()]))
        layer.norm.bias = nn.Parameter(distribute_tensor(layer.norm.bias.detach(), mesh, [Replicate()]))
        layer.norm.register_forward_pre_hook(lambda _, args: distribute_tensor(args[0], mesh, [Replicate()]))
        layer.norm.register_forward_hook(lambda _m, _a, out: out.to_local())
    return m


# Models of transformers -------------------------------------------------------------------------------------------

# Heads and widths that 2 divides. 3 divides none of the widths, and the heads of OPT and GPT-2 need not be divided.
_FAMILIES = {
    "llama": {"hidden_size": 16, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "pad_token_id": None},
    "opt": {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 14, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "max_position_embeddings": 16},
    "gpt2": {"n_embd": 16, "n_inner": 14, "n_layer": 2, "n_head": 4, "n_positions": 16},
}


def family(name, dtype=torch.float32):
    """A tiny model of a family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=VOCABULARY, use_cache=False, **_FAMILIES[name])
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def by_plan(m, mesh):
    """By the plan of transformers, or our own."""
    from zotune.llm.models.placement.sharded import cut_by_plan

    cut_by_plan(m)
    return m
