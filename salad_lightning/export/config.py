"""What ``config.json`` of an exported speech LLM says."""

from __future__ import annotations

import re
from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec

from salad_lightning import __version__
from salad_lightning.errors import UserError

__all__ = ["SaladConfig"]


class SaladConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """Parts of a speech LLM: which classes they are, how they were built, and what holds their weights.

    Attributes:
        salad_version: Version of this package that wrote the folder.
        encoder: ``class_path`` and ``init_args``; an argument ``{"folder": name}`` is a folder inside the export.
        encoder_identity: `Encoder.identity` of the encoder that the connector was trained on.
        connector: ``class_path`` and ``init_args``, without the widths.
        switch_embeddings: Whether there is a learned embedding on either side of speech.
        context: Positions the model was trained on.
        sample_rate_hz: Of the encoder.
        text_config: The language model's own configuration.
    """

    model_type = "salad"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2")}  # noqa: RUF012

    salad_version: str = __version__
    encoder: dict[str, Any] | None = None
    encoder_identity: str = ""
    connector: dict[str, Any] | None = None
    switch_embeddings: bool = False
    context: int = 2048
    sample_rate_hz: int = 16_000
    text_config: dict[str, Any] | PreTrainedConfig | None = None

    def check_version(self, where: str) -> None:
        """Refuse a folder that a newer version of this package wrote.

        Raises:
            UserError: If it did.
        """
        if _release(self.salad_version) > _release(__version__):
            raise UserError(
                f"the folder was written by salad-lightning {self.salad_version}, and this is {__version__}",
                where=where,
                cure="upgrade: pip install --upgrade salad-lightning",
            )


def _release(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]


AutoConfig.register(SaladConfig.model_type, SaladConfig)
