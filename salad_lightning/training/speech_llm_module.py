"""Trains a text LLM to understand speech: both stages of SALAD."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from salad_lightning.batch import ObjectiveOutput, Prediction, SpeechBatch
from salad_lightning.data.spec import SequenceSpec
from salad_lightning.errors import UserError
from salad_lightning.evaluation.gap import measure
from salad_lightning.interfaces import Connector, ConnectorFactory, Encoder, Objective
from salad_lightning.model.adapters import LoRA, adapters_off, add_adapters, nf4, quantization_kl
from salad_lightning.model.execution import Execution, prepare_blocks, prepare_process
from salad_lightning.model.llm import (
    LanguageModel,
    build_language_model,
    load_config,
    load_language_model,
    load_tokenizer,
)
from salad_lightning.model.parallel import (
    check_device,
    compute_dtype,
    reshard,
    shard_language_model,
    shard_speech_llm,
)
from salad_lightning.model.placement import Placement, load_placed
from salad_lightning.model.speech_llm import SpeechLLM, freeze, predict_transcripts
from salad_lightning.model.streaming import meta_parameters, weights_mark
from salad_lightning.training.checkpoints import check_outline, check_trained, load_checkpoint
from salad_lightning.training.cost import speech_flops, step_flops
from salad_lightning.training.handover import check_handover, check_not_decayed, describe_parts, take_weights
from salad_lightning.training.measured_module import MeasuredModule
from salad_lightning.training.optimizer import default_optimizer
from salad_lightning.training.schedule import WarmupStableDecay
from salad_lightning.training.speed_monitor import Work, count_parameters, size_of, trained_share

__all__ = ["SpeechLLMModule"]

# What quantisation is measured on; no model has to have seen it.
_PROBE = (
    "The kettle had just begun to sing when the postman knocked. She put the letter on the table, beside the bread and "
    "the blue jug, and did not open it until the evening, when the last boats had come in and the harbour was still."
)


class SpeechLLMModule(MeasuredModule):
    """Connector and LLM trained on interleaved text and speech, against the LLM's own text-only self.

    Args:
        llm: Folder or hub name of the text LLM.
        encoder: Frozen speech encoder.
        connector: Connector class; the widths on its two sides are filled in.
        objective: What is minimised; ForwardKLObjective is SALAD.
        teacher: Folder or hub name of the teacher Q; by default the untouched ``llm``.
        context: Positions in a row, text tokens and speech together.
        connector_lr: Learning rate of the connector (and of the mix over encoder layers).
        llm_lr: Learning rate of the LLM.
        optimizer: Optimizer class; rates come from the two keys above.
        schedule: Warm-up, stable, decay.
        freeze: Shell patterns of parameter names to keep fixed, such as ``llm.*`` or ``*embed_tokens*``.
        switch_embeddings: Learn one embedding before and one after each speech span.
        init_from: Checkpoint to take weights from (not the optimizer, the step or the place in the data). It must have
            been trained with the same parts.
        require_pre_decay: Refuse an ``init_from`` whose learning rate had decayed: Stage II goes on from before.
        gap_every_n_steps: Measure misalignment and forgetting on the training batch every so many steps; 0 is never.
        report_by: JSON field of the samples by which test results are broken down.
        execution: Activation checkpointing, compilation and attention kernel.
        lora: Train low-rank updates of the LLM in place of all its weights; the teacher is then the same weights
            without them. On one device or under DDP.
        quantize: ``nf4`` holds the LLM's frozen matrices in 4 bits (QLoRA); needs ``lora``.
    """

    def __init__(
        self,
        llm: str,
        encoder: Encoder,
        connector: ConnectorFactory,
        objective: Objective,
        teacher: str | None = None,
        context: int = 2048,
        connector_lr: float = 1e-3,
        llm_lr: float = 5e-5,
        optimizer: OptimizerCallable = default_optimizer,
        schedule: WarmupStableDecay | None = None,
        freeze: list[str] | None = None,
        switch_embeddings: bool = False,
        init_from: str | None = None,
        require_pre_decay: bool = False,
        gap_every_n_steps: int = 0,
        report_by: str = "domain",
        execution: Execution | None = None,
        lora: LoRA | None = None,
        quantize: Literal["nf4"] | None = None,
    ) -> None:
        super().__init__(optimizer, schedule, report_by=report_by)
        self.save_hyperparameters()
        self.objective = objective
        self._llm_path, self._teacher_path = llm, teacher or llm
        self._config = load_config(llm)
        self._tokenizer = load_tokenizer(llm, self._config)
        if teacher is not None and teacher != llm:
            other = load_tokenizer(teacher, load_config(teacher))
            if other.get_vocab() != self._tokenizer.get_vocab():
                raise UserError(
                    f"teacher and LLM have different vocabularies: there is no KL between {teacher} and {llm}",
                    where="model.teacher",
                    cure="use a teacher with the LLM's tokenizer",
                )
        built = connector(encoder_dim=encoder.output_dim, llm_dim=self._config.get_text_config().hidden_size)
        self._parts: tuple[Encoder, Connector] = (encoder, built)  # a tuple: they are registered inside the SpeechLLM
        for name, value, least in (("connector_lr", connector_lr, 0), ("llm_lr", llm_lr, 0), ("context", context, 1)):
            if not value >= least:
                raise UserError(f"{value} is too small", where=f"model.{name}", cure=f"give {least} or more")
        self._context, self._switch = context, switch_embeddings
        self._rates = {"connector": connector_lr, "llm": llm_lr}
        self._freeze, self._init_from, self._require_pre_decay = freeze or [], init_from, require_pre_decay
        self._encoder_identity = ""
        self._gap_every = gap_every_n_steps
        self._execution, self._lora, self._quantize = execution or Execution(), lora, quantize
        if quantize and lora is None:
            raise UserError(
                f"{quantize} weights cannot be trained",
                where="model.quantize",
                cure="leave it out, or set model.lora too",
            )
        self._teacher: tuple[LanguageModel] | None = None
        self._gap: dict[str, Tensor] = {}  # sums and counts of this optimizer step
        self._probe_kl: float | None = None
        self._taken: set[str] = set()  # names of the weights that came from init_from
        self._counted: dict[str, Any] = {}  # what flops() needs of the model, once it is there

    def setup(self, stage: str) -> None:
        """See `TokenLossModule.setup`; also refuse what does not go together, before any weight is loaded."""
        super().setup(stage)
        self._execution.check(self.trainer.strategy.root_device)
        prepare_process(self.trainer.strategy.root_device, self._execution)
        for key, value in (("lora", self._lora), ("quantize", self._quantize)):
            if value and self.device_mesh is not None:
                raise UserError(
                    f"{key} does not run under FSDP2",
                    where=f"model.{key}",
                    cure="set trainer.strategy to auto (one device) or ddp, or leave it out",
                )
        if self._init_from and not hasattr(self, "model"):
            self.check_checkpoint(self._init_from)
        if not (stage == "fit" or self.trainer.ckpt_path or self._init_from or hasattr(self, "model")):
            rank_zero_warn(
                "the connector has random weights: neither --ckpt_path nor model.init_from names what was trained"
            )

    def configure_model(self) -> None:
        """Load the weights, once, and spread them if the strategy asks for it."""
        if hasattr(self, "model"):
            return
        attached = self._trainer is not None
        place = self._placement()
        llm = self._load_llm(place, attached)
        model = self._assemble(llm)
        # Spans are of any length: only checkpointing is for the connector.
        prepare_blocks(getattr(model.connector, "layers", []), dataclasses.replace(self._execution, compile=False))
        if place.mesh is not None:
            sharded_encoder = getattr(self.trainer.strategy, "shard_encoder", False)
            shard_speech_llm(model, place.mesh, place.dtype, encoder=sharded_encoder)
            model.check_llm()
            reshard(model)
        self.model = model.train()  # from_pretrained gives eval mode; the encoder stays in it
        if self._init_from:
            if not attached:
                self.check_checkpoint(self._init_from)
            self._taken = take_weights(self, self._init_from, sharded=place.mesh is not None)
        if attached and self._wants_teacher:
            # The teacher is not a registered submodule: it is never trained, saved or summarised. Hence the tuple.
            self._teacher = (self._load_teacher(place),)

    def _placement(self) -> Placement:
        if self._trainer is None:
            return Placement(torch.device("cpu"), torch.float32)
        dtype, device = compute_dtype(self.trainer.precision), self.trainer.strategy.root_device
        check_device(dtype, device)
        return Placement(device, dtype, None if self.device_mesh is None else self.device_mesh["data_parallel"])

    def _load_llm(self, place: Placement, attached: bool) -> LanguageModel:
        vocab_size, settings = len(self._tokenizer), self._execution
        frozen = self._freezes_llm()  # and so in the compute dtype
        if self._lora is None and not frozen:
            return load_placed(self._llm_path, vocab_size, place, settings, trained=True)
        # Gradients flow through what is frozen, so its blocks are prepared here: `load_placed` would not checkpoint
        # them, and what is compiled must hold the checkpointing, not the other way round.
        later = Execution(attention=settings.attention)
        if self._lora is None:
            llm = load_placed(self._llm_path, vocab_size, place, later, trained=False)
            prepare_blocks(llm.blocks, settings)
            return llm
        quantization = nf4(place.dtype) if self._quantize and attached else None
        llm = load_placed(self._llm_path, vocab_size, place, later, trained=not attached, quantization=quantization)
        if quantization is not None:
            self._report_quantization(llm, place)
        add_adapters(llm, self._lora)
        prepare_blocks(llm.blocks, settings)
        return llm

    def _freezes_llm(self) -> bool:
        if not self._freeze:
            return False
        names = [f"llm.{name}" for name, _ in self._empty_llm().named_parameters()]
        return all(any(fnmatch.fnmatch(name, pattern) for pattern in self._freeze) for name in names)

    def _empty_llm(self) -> LanguageModel:
        with meta_parameters():
            return build_language_model(self._config, len(self._tokenizer))

    def _assemble(self, llm: LanguageModel) -> SpeechLLM:
        encoder, connector = self._parts
        model = SpeechLLM(llm=llm, encoder=encoder, connector=connector, switch_embeddings=self._switch)
        freeze(model, self._freeze)
        return model

    def _load_teacher(self, place: Placement) -> LanguageModel:
        settings = self._execution
        teacher = load_placed(self._teacher_path, len(self._tokenizer), place, settings, trained=False)
        teacher.requires_grad_(False).eval().to(place.device)
        if place.mesh is not None:
            shard_language_model(teacher, place.mesh, place.dtype)
            teacher.check_against_hugging_face()
            reshard(teacher)
        return teacher

    @property
    def _teaches_itself(self) -> bool:
        """Whether the LLM without its adapters is the teacher."""
        return self._lora is not None and self._teacher_path == self._llm_path

    @property
    def _wants_teacher(self) -> bool:
        """Whether it is loaded from the start, and not when it is asked."""
        return not self._teaches_itself

    def _report_quantization(self, llm: LanguageModel, place: Placement) -> None:
        """How far the 4-bit model, which is the teacher too, is from the original."""
        exact = load_language_model(self._llm_path, len(self._tokenizer), place.dtype)
        llm.to(place.device)
        kl = quantization_kl(exact.to(place.device), llm, self._tokenizer.encode(_PROBE))
        self._probe_kl = kl
        rank_zero_info(
            f"KL of the original LLM to its {self._quantize} weights: {kl:.4f} nats a token, on a short text"
        )

    def sequence_spec(self) -> SequenceSpec:
        """Lengths and tokenizer, for the data module."""
        encoder, connector = self._parts
        # Once, before the strategy casts or moves the encoder.
        self._encoder_identity = self._encoder_identity or encoder.identity()
        return SequenceSpec.of_parts(
            self._tokenizer,
            self._context,
            encoder=encoder,
            connector=connector,
            switch_embeddings=self._switch,
            identity=self._encoder_identity,
        )

    def parameter_rates(self) -> dict[str, tuple[float, list[tuple[str, nn.Parameter]]]]:
        """Two groups: the LLM, and everything else that is trained."""
        named = list(self.model.named_parameters())
        llm = [(name, parameter) for name, parameter in named if name.startswith("llm.")]
        other = [(name, parameter) for name, parameter in named if not name.startswith("llm.")]
        return {"connector": (self._rates["connector"], other), "llm": (self._rates["llm"], llm)}

    def compute_loss(self, batch: SpeechBatch) -> ObjectiveOutput:
        """Student, and the teacher where the objective needs it or the gap is measured at this step."""
        gap_due = self._gap_every > 0 and self.global_step % self._gap_every == 0
        teacher = self.teach(batch) if self.objective.needs_teacher or gap_due else None
        output: ObjectiveOutput = self.model(batch, self.objective, teacher)
        if gap_due and teacher is not None:
            # On every rank, whatever its batch holds: sharded models run in step.
            for name, (total, count) in measure(self.model, batch, teacher).sums().items():
                self._gap[name] = self._gap.get(name, 0) + torch.stack([total.float(), count.float()])
        return output

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gap where it was measured, over the global batch."""
        super().on_before_optimizer_step(optimizer)
        if not self._gap:
            return
        names = sorted(self._gap)
        totals = torch.stack([self._gap[name] for name in names])
        self._gap.clear()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(totals)
        values = (totals[:, 0] / totals[:, 1].clamp(min=1)).tolist()
        # Not self.log: that repeats the last value in the rows of all the steps between.
        for logger in self.trainer.loggers:
            logger.log_metrics({f"train/{n}": v for n, v in zip(names, values, strict=True)}, step=self.global_step)

    def on_train_start(self) -> None:
        """Log, once, what quantisation changed."""
        super().on_train_start()
        if self._probe_kl is not None:
            for logger in self.trainer.loggers:
                logger.log_metrics({"train/quantization_kl": self._probe_kl}, step=0)

    def flops(self, work: Work) -> float:
        """Student, teacher (where the objective asks it), frozen encoder and connector: `training.cost`."""
        if not self._counted:
            self._counted = {
                "llm": size_of(self.model.llm),
                "llm_trained": trained_share(self.model.llm),
                "encoder": count_parameters(self.model.encoder),
                "connector": count_parameters(self.model.connector),
                "connector_trained": trained_share(self.model.connector),
            }
            if self.objective.needs_teacher:
                self._counted["teacher"] = size_of(self._teacher[0]) if self._teacher else self._counted["llm"]
        counted, encoder = self._counted, self.model.encoder
        llms = step_flops(
            counted["llm"],
            counted.get("teacher"),
            positions=work.positions,
            teacher_positions=work.teacher_positions,
            predicted=work.predicted,
            mean_context=work.context / max(work.positions, 1),
            teacher_mean_context=work.teacher_context / max(work.teacher_positions, 1),
            trained_share=counted["llm_trained"],
        )
        speech = speech_flops(
            encoder_parameters=counted["encoder"],
            frames=work.samples * encoder.frame_rate_hz / encoder.sample_rate_hz,
            connector_parameters=counted["connector"],
            positions=work.speech_positions,
            trained_share=counted["connector_trained"],
        )
        return llms + speech

    @torch.no_grad()
    def teach(self, batch: SpeechBatch) -> Prediction:
        """Q(· | w): the original LLM's prediction of the batch's tokens from the plain transcripts."""
        if self._teaches_itself:
            with adapters_off(self.model.llm):
                return predict_transcripts(self.model.llm, batch)
        if self._teacher is None:
            if self._trainer is None:
                raise RuntimeError("the teacher is loaded by a Trainer; this module is not attached to one")
            self._teacher = (self._load_teacher(self._placement()),)  # of a module that seldom wants one
        return predict_transcripts(self._teacher[0], batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the parts, for the next stage."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["salad_lightning"]["parts"] = self._described()

    def _described(self) -> dict[str, str]:
        return describe_parts(
            config=self._config,
            tokenizer=self._tokenizer,
            encoder=self.sequence_spec().encoder,
            connector=self._parts[1],
            switch=self._switch,
            llm_weights=self._llm_mark,
        )

    def check_checkpoint(self, path: str, *, goes_on: bool = False) -> None:
        """Refuse a checkpoint of other parts or shapes, from names and shapes alone.

        Raises:
            UserError: With what differs.
        """
        checkpoint = load_checkpoint(path, weights_only=True, outline=True)
        check_handover(checkpoint, self._described(), path)
        if self._require_pre_decay and path == self._init_from:
            check_not_decayed(checkpoint, path)
        llm = self._empty_llm()
        if self._lora is not None:
            add_adapters(llm, self._lora)
        # This module as it will be: the names of its weights begin with those of its attributes.
        outline = nn.ModuleDict({"model": self._assemble(llm), "objective": self.objective})
        check_outline(outline, checkpoint, path)
        if goes_on:
            check_trained(outline, checkpoint, path)

    @functools.cached_property
    def _llm_mark(self) -> str:
        return weights_mark(self._llm_path)

    def left_out(self) -> set[str]:
        """Frozen weights of LLM and encoder, unless they came from ``init_from``, which may be gone one day."""
        own = ("model.llm.", "model.encoder.")
        return {name for name in self.frozen_names() if name.startswith(own)} - self._taken
