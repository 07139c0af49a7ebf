"""A continuous integrate-and-fire connector for salad-lightning."""
