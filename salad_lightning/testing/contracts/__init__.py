"""One contract test class for each kind of part; subclass it in a test file to check a part of your own."""

from __future__ import annotations

from salad_lightning.testing.contracts.connector import ConnectorContract
from salad_lightning.testing.contracts.encoder import EncoderContract
from salad_lightning.testing.contracts.objective import ObjectiveContract
from salad_lightning.testing.contracts.synthesizer import SynthesizerContract

__all__ = ["ConnectorContract", "EncoderContract", "ObjectiveContract", "SynthesizerContract"]
