"""Every tuning scheme by its options, and a few examples to score with it."""

import torch

from zotune.llm.config.run import TrainConfig
from zotune.llm.data.examples import Example
from zotune.llm.models.tuned_parameters import prepare_tuning

WORDS = (" terrible", " great")
EXAMPLES = tuple(
    Example(f"{text} It was", WORDS, i % 2, "")
    for i, text in enumerate(["dull", "a gorgeous film that never ends", "warm", "see it in the dark, twice"])
)
SCHEMES = {
    "full": {"tuning": "full"},
    "head": {"tuning": "head"},
    "layers": {"tuning": "full", "tuned_layers": 1},
    "pattern": {"tuning": "full", "tuned_parameters": "(?i)norm"},
    "lora": {"tuning": "lora"},
    "prefix": {"tuning": "prefix"},
    "prompt": {"tuning": "prompt"},
    "ia3": {"tuning": "peft", "peft_type": "ia3"},
    "vera": {"tuning": "peft", "peft_type": "VeRA", "peft_config": {"r": 4}},
}


def prepared(lm, **options):
    prepare_tuning(lm, TrainConfig.model_validate({"task": "sst2", **options}))
    return lm


def tuned_of(lm):
    return [p for p in lm.module.parameters() if p.requires_grad]


def moved(lm, scale=0.3):
    """The same model, what is tuned elsewhere: a fresh adapter would hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in tuned_of(lm):
            p += scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return lm
