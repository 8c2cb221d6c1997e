"""What the speed claims rest on: one file a claim, and RESULTS.md, which `python -m benchmarks` writes."""
