"""Speech-adapted text LLMs by cross-modal distillation, for PyTorch Lightning."""

__version__ = "0.1.0"
