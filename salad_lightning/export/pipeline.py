"""``transformers.pipeline("speech-text-generation", model=DIR)`` for exported speech LLMs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from salad_lightning.export.modeling import SaladForConditionalGeneration
from salad_lightning.export.pretrained import SpeechLanguageModel
from salad_lightning.export.processor import SaladProcessor
from salad_lightning.model.generation import Decoding

__all__ = ["TASK", "SpeechTextGenerationPipeline"]

TASK = "speech-text-generation"
"""Registered with transformers when `salad_lightning.export` is imported."""


class SpeechTextGenerationPipeline(Pipeline):
    """Audio in, text out: a file, or ``{"raw": samples, "sampling_rate": hertz}``, as of recognition pipelines.

    Arguments, of ``pipeline(…)`` or of a call, are those of `SpeechLanguageModel.generate`: ``prompt`` and how tokens
    are chosen.
    """

    # Its processor is none of transformers' own kind, which alone is handed on. Their types are not declared there.
    _load_processor: Any = False
    _load_tokenizer: Any = False
    _load_feature_extractor: Any = False
    _load_image_processor: Any = False

    def __init__(self, model: SaladForConditionalGeneration, **options: Any) -> None:
        super().__init__(model=model, **options)
        self._language_model = SpeechLanguageModel(
            model, SaladProcessor.from_pretrained(str(model.config.name_or_path))
        )

    def _sanitize_parameters(self, **given: Any) -> tuple[dict[str, Any], ...]:
        # Only what was given: transformers puts the arguments of a call over those of the construction.
        decoding = {name: value for name, value in given.items() if name != "prompt"}
        Decoding(**decoding)  # refuses what is wrong
        return {name: given[name] for name in ("prompt", "max_new_tokens") if name in given}, decoding, {}

    def preprocess(  # type: ignore[override]  # the parameters by name
        self, input_: Any, prompt: str = "{speech}", max_new_tokens: int = Decoding.max_new_tokens
    ) -> dict[str, Any]:
        """A prompt with its audio; refuses what does not fit."""
        audio, rate = (input_["raw"], input_["sampling_rate"]) if isinstance(input_, dict) else (Path(input_), None)
        prepare = self._language_model.prepare
        return {"document": prepare(prompt, audio, sampling_rate=rate, max_new_tokens=max_new_tokens)}

    def _forward(self, input_tensors: Any, **decoding: Any) -> Any:
        return self._language_model.complete([input_tensors["document"]], Decoding(**decoding))

    def postprocess(self, model_outputs: Any, **_: Any) -> dict[str, str]:
        """``{"generated_text": …}``."""
        return {"generated_text": model_outputs[0]}


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=SpeechTextGenerationPipeline, pt_model=(SaladForConditionalGeneration,), type="multimodal"
)
