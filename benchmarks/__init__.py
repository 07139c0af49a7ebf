"""What is measured, against what; how to rerun it and what came out is in RESULTS.md."""
