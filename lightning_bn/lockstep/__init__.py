"""Batches that wait for each other at every BatchNorm layer."""
