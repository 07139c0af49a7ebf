"""Two speech encoders side by side for salad-lightning."""
