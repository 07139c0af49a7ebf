"""Sentence embeddings through any Hugging Face encoder, on any number of devices by Lightning's ``predict``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from salad_lightning.errors import UserError
from salad_lightning.selection.corpus import TextCorpus
from salad_lightning.selection.settings import EmbedSettings

__all__ = ["Pooling", "TransformerEmbedder", "embed_with_transformer", "embedding_dim", "pooling_of"]

Pooling = Literal["cls", "mean"]


def embedding_dim(path: str) -> int:
    """Width of an encoder's hidden states.

    Raises:
        UserError: If there is no such encoder.
    """
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise UserError(
            f"no encoder can be loaded ({first})", where=f"embed.encoder: {path}", cure="give a folder, or tfidf"
        ) from error
    return int(config.get_text_config().hidden_size)


def pooling_of(path: str) -> Pooling:
    """What a sentence-transformers folder says in ``1_Pooling/config.json``; ``mean`` where there is none.

    Raises:
        UserError: If it pools in a way that is not supported.
    """
    found = cached_file(
        path,
        "1_Pooling/config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if found is None:
        return "mean"
    config = json.loads(Path(found).read_text(encoding="utf-8"))
    # One flag a mode, or the mode's name.
    modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    modes = [config["pooling_mode"]] if isinstance(config.get("pooling_mode"), str) else modes
    short = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
    names = [short.get(mode, mode) for mode in modes]
    if names == ["cls"]:
        return "cls"
    if names == ["mean"]:
        return "mean"
    raise UserError(f"pooling by {names} is not supported", where=str(found), cure="set embed.pooling to cls or mean")


class TransformerEmbedder(LightningModule):
    """Writes each text's embedding, scaled to length 1, into its row of a file.

    Args:
        encoder: Folder or hub name.
        pooling: First token, or mean over tokens.
        path: float32 ``.npy`` file ``[N, D]``.
        done_path: bool ``.npy`` file ``[N]``: rows that are written.
    """

    def __init__(self, encoder: str, pooling: Pooling, path: Path, done_path: Path) -> None:
        super().__init__()
        self.model = AutoModel.from_pretrained(encoder).eval()
        self.pooling, self.path, self.done_path = pooling, path, done_path

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Embed one batch; ``rows`` are the places of its texts."""
        rows = batch.pop("rows").cpu().numpy()
        hidden_NTD = self.model(**batch).last_hidden_state.float()
        pooled_ND = hidden_NTD[:, 0] if self.pooling == "cls" else _mean(hidden_NTD, batch["attention_mask"])
        unit_ND = torch.nn.functional.normalize(pooled_ND, dim=-1)
        # Every process writes rows of its own; a row is marked only after it has been written.
        np.load(self.path, mmap_mode="r+")[rows] = unit_ND.cpu().numpy()
        np.load(self.done_path, mmap_mode="r+")[rows] = True


def _mean(hidden_NTD: Tensor, mask_NT: Tensor) -> Tensor:
    weight = mask_NT.unsqueeze(-1).to(hidden_NTD.dtype)
    return (hidden_NTD * weight).sum(1) / weight.sum(1).clamp(min=1)


def embed_with_transformer(
    corpus: TextCorpus, rows: NDArray[np.int64], settings: EmbedSettings, path: Path, done_path: Path
) -> None:
    """Embed some texts of a corpus.

    Args:
        corpus: All texts.
        rows: Which.
        settings: Encoder, pooling, batch size, devices.
        path: float32 ``.npy`` file ``[N, D]`` to write into.
        done_path: bool ``.npy`` file ``[N]`` to mark written rows in.
    """
    pooling = settings.pooling or pooling_of(settings.encoder)
    if pooling not in ("cls", "mean"):
        raise UserError(f"{pooling!r} is no pooling", where="embed.pooling", cure="give cls or mean")
    module = TransformerEmbedder(settings.encoder, pooling, path, done_path)  # type: ignore[arg-type]  # checked above
    tokenizer = AutoTokenizer.from_pretrained(settings.encoder)
    positions = getattr(module.model.config, "max_position_embeddings", None) or settings.max_tokens
    longest = min(settings.max_tokens, positions, tokenizer.model_max_length)
    # Texts of like length together: less padding.
    rows = rows[np.argsort(corpus.num_bytes()[rows], kind="stable")]
    loader = DataLoader(
        _Texts(corpus, rows), batch_size=settings.batch_size, collate_fn=partial(_collate, tokenizer, longest)
    )
    trainer = Trainer(
        accelerator=settings.accelerator,
        devices=settings.devices,
        # Spawned processes run this loop alone; launched ones would run the whole command again.
        strategy="auto" if settings.devices == 1 else "ddp_spawn",
        precision=settings.precision,  # type: ignore[arg-type]  # checked by the Trainer
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
        callbacks=[TQDMProgressBar()],
    )
    trainer.predict(module, loader, return_predictions=False)


class _Texts(Dataset[tuple[int, str]]):
    def __init__(self, corpus: TextCorpus, rows: NDArray[np.int64]) -> None:
        self.corpus, self.rows = corpus, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, str]:
        row = int(self.rows[index])
        return row, self.corpus[row]["text"]


def _collate(tokenizer: Any, max_tokens: int, items: Sequence[tuple[int, str]]) -> dict[str, Tensor]:
    rows, texts = zip(*items, strict=True)
    encoded = tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    return {**encoded, "rows": torch.tensor(rows)}
