"""TRL's trainers by forward passes: in a script, import these in place of TRL's, and choose a learning rate.

    from zotune.integrations.trl import ZOSFTConfig as SFTConfig, ZOSFTTrainer as SFTTrainer

Any other trainer of TRL whose loss is a function of weights and rows takes the same two classes.
"""

from __future__ import annotations

from dataclasses import dataclass

try:
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError("zotune.integrations.trl needs TRL: pip install 'zotune[llm,trl]'") from error

from zotune.integrations.transformers import ZerothOrderArguments, ZerothOrderMixin


@dataclass
class ZOSFTConfig(ZerothOrderArguments, SFTConfig):  # type: ignore[misc]
    """`trl.SFTConfig` with the options of the method."""


@dataclass
class ZODPOConfig(ZerothOrderArguments, DPOConfig):  # type: ignore[misc]
    """`trl.DPOConfig` with the options of the method."""


@dataclass
class ZOKTOConfig(ZerothOrderArguments, KTOConfig):  # type: ignore[misc]
    """`trl.KTOConfig` with the options of the method."""


@dataclass
class ZORewardConfig(ZerothOrderArguments, RewardConfig):  # type: ignore[misc]
    """`trl.RewardConfig` with the options of the method."""


class ZOSFTTrainer(ZerothOrderMixin, SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` by forward passes."""


class ZODPOTrainer(ZerothOrderMixin, DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` by forward passes."""


class ZOKTOTrainer(ZerothOrderMixin, KTOTrainer):  # type: ignore[misc]
    """`trl.KTOTrainer` by forward passes."""


class ZORewardTrainer(ZerothOrderMixin, RewardTrainer):  # type: ignore[misc]
    """`trl.RewardTrainer` by forward passes."""
