"""The speech LLM as a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from salad_lightning.batch import Prediction, SpeechBatch
from salad_lightning.errors import UserError
from salad_lightning.export.config import SaladConfig
from salad_lightning.export.parts import build_parts
from salad_lightning.model.adapters import has_adapters, save_adapters
from salad_lightning.model.llm import ADAPTERS, LanguageModel, load_language_model, load_tokenizer
from salad_lightning.model.speech_llm import SpeechLLM
from salad_lightning.projection import logits

__all__ = ["LLM_FOLDER", "SaladForConditionalGeneration", "find_export", "save_language_model"]

LLM_FOLDER = "llm"
"""Inside an export: the language model and its tokenizer, which `AutoModelForCausalLM` loads alone."""

_WEIGHTS = "speech.safetensors"
# Of each line one.
_NEEDED = (
    ("config.json",),
    (_WEIGHTS,),
    (f"{LLM_FOLDER}/config.json", f"{LLM_FOLDER}/{ADAPTERS}"),
    (f"{LLM_FOLDER}/tokenizer.json",),
)
# What `from_pretrained` of other models takes, and would be a lie to take in silence.
_REFUSED = ("device_map", "quantization_config", "load_in_8bit", "load_in_4bit", "output_loading_info", "state_dict")


class SaladForConditionalGeneration(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A `SpeechLLM` with its configuration.

    Its folder holds the language model in the language model's own format (``llm``) and everything else that was
    trained in ``speech.safetensors``; a frozen encoder is built from its own folder or hub name.

    Args:
        config: Describes the parts.
        speech_llm: The parts.
    """

    config_class = SaladConfig
    base_model_prefix = "speech_llm"
    main_input_name = "batch"
    _supports_sdpa = True

    def __init__(self, config: SaladConfig, speech_llm: SpeechLLM) -> None:
        super().__init__(config)
        self.speech_llm = speech_llm

    def forward(self, batch: SpeechBatch) -> CausalLMOutput:
        """Logits ``[B, S, V]`` after every position, speech and padding included, over the tokenizer's V tokens.

        Args:
            batch: Rows of text and speech (`salad_lightning.data.packing.collate`).
        """
        B, S = batch.input_ids_BS.shape
        prediction: Prediction = self.speech_llm.llm(
            batch.position_ids_BS,
            batch.document_ids_BS,
            torch.arange(B * S, device=batch.input_ids_BS.device),
            embeddings_BSD=self.speech_llm.embed(batch),
        )
        return CausalLMOutput(logits=logits(prediction).view(B, S, -1))

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # type: ignore[override]
        """Write configuration and weights; `salad_lightning.export.save_speech_llm` writes the whole folder.

        Args:
            save_directory: Made if missing.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures = [type(self).__name__]
        self.config.save_pretrained(folder)
        save_language_model(self.speech_llm.llm, folder / LLM_FOLDER)
        # Cloned: the format refuses tensors that share memory.
        tensors = {name: value.detach().clone().contiguous() for name, value in _trained(self.speech_llm).items()}
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        config: SaladConfig | None = None,
        dtype: torch.dtype | str | None = None,
        **options: Any,
    ) -> SaladForConditionalGeneration:
        """A trained model in eval mode, on the CPU.

        Args:
            pretrained_model_name_or_path: Folder or hub name.
            config: Read from the folder where None.
            dtype: Of the language model; fp32 where None, the saved one where "auto". Connector and encoder are fp32.
            options: Those of the auto classes; none is used.

        Raises:
            UserError: If a file is missing, damaged, or of a newer version, or a part cannot be built.
            ValueError: For an option that changes what is loaded and is not supported.
        """
        if refused := [name for name in _REFUSED if options.get(name) is not None]:
            raise ValueError(f"{cls.__name__}.from_pretrained does not support {refused[0]}")
        folder = find_export(pretrained_model_name_or_path)
        config = config or SaladConfig.from_pretrained(folder)
        config.check_version(str(folder))
        config.name_or_path = str(folder)  # where pipelines look for the processor
        llm_folder = str(folder / LLM_FOLDER)
        vocab_size = len(load_tokenizer(llm_folder, config.get_text_config()))
        encoder, connector = build_parts(config, folder)
        speech_llm = SpeechLLM(
            llm=load_language_model(llm_folder, vocab_size, _dtype(dtype or options.get("torch_dtype"), config)),
            encoder=encoder,
            connector=connector,
            switch_embeddings=config.switch_embeddings,
        )
        _load(speech_llm, folder / _WEIGHTS)
        model = cls(config, speech_llm)
        model.train(False)
        return model


def save_language_model(llm: LanguageModel, folder: Path) -> None:
    """Write a language model as `AutoModelForCausalLM` reads it; where it has adapters, these alone."""
    if has_adapters(llm):
        save_adapters(llm, folder)
    else:
        llm.hf.save_pretrained(folder)


def find_export(path: str | Path) -> Path:
    """The folder of an export, downloaded where ``path`` is a hub name.

    Raises:
        UserError: If there is none, or a file is missing from it.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(huggingface_hub.snapshot_download(str(path)))
        except (OSError, ValueError) as error:
            raise UserError(
                "no such folder, nor a name that the Hugging Face hub gives out", where=str(path), cure="check the path"
            ) from error
    for names in _NEEDED:
        if not any((folder / name).is_file() for name in names):
            raise UserError(
                f"the folder holds no {names[0]}",
                where=str(folder),
                cure="write it again with `salad-lightning export`",
            )
    return folder


def _dtype(wanted: torch.dtype | str | None, config: SaladConfig) -> torch.dtype:
    found = config.get_text_config().dtype if wanted == "auto" else wanted
    found = getattr(torch, found) if isinstance(found, str) else found
    return found or torch.float32


def _trained(speech_llm: SpeechLLM) -> dict[str, Tensor]:
    """All weights but those of the language model and of the frozen encoder."""
    return {name: value for name, value in speech_llm.state_dict().items() if not name.startswith(("llm.", "encoder."))}


def _load(speech_llm: SpeechLLM, file: Path) -> None:
    ours = _trained(speech_llm)
    try:
        theirs = load_file(file)
    except SafetensorError as error:
        _damaged(file, f"the weights cannot be read ({error})", error)
    if different := sorted(set(ours) ^ set(theirs)) or [n for n in ours if ours[n].shape != theirs[n].shape]:
        _damaged(file, f"the weights do not fit config.json: {different[0]} ({len(different)} in all)", None)
    speech_llm.load_state_dict(theirs, strict=False)


def _damaged(file: Path, what: str, error: Exception | None) -> NoReturn:
    raise UserError(what, where=str(file), cure="copy or export the folder again") from error


AutoModel.register(SaladConfig, SaladForConditionalGeneration)
