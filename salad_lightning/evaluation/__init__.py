"""What is measured of a model: misalignment, forgetting, spoken multiple choice."""
