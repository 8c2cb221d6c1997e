"""Batch statistics of training steps: their recovery, drift, history and forecast."""
