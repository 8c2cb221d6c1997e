"""The code that depends on a Trainer's internals."""
