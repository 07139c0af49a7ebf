"""Trained models as Hugging Face folders: importing this makes transformers' auto classes and pipelines know them."""

from __future__ import annotations

from salad_lightning.export.config import SaladConfig
from salad_lightning.export.folder import save_llm, save_speech_llm
from salad_lightning.export.modeling import SaladForConditionalGeneration
from salad_lightning.export.pipeline import SpeechTextGenerationPipeline
from salad_lightning.export.pretrained import SpeechLanguageModel, load_pretrained
from salad_lightning.export.processor import SaladProcessor

__all__ = [
    "SaladConfig",
    "SaladForConditionalGeneration",
    "SaladProcessor",
    "SpeechLanguageModel",
    "SpeechTextGenerationPipeline",
    "load_pretrained",
    "save_llm",
    "save_speech_llm",
]
