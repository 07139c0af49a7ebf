"""On-policy distillation for salad-lightning."""
