"""A recurrent connector for salad-lightning."""
