"""Lightning modules, the learning-rate schedule, and callbacks."""
