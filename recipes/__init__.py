"""Runnable experiments, each a table or figure of the paper. `python -m recipes` lists them."""
