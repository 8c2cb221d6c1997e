"""Execution of batches that wait for each other at every BatchNorm layer."""
