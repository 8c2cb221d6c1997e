"""The only rooms that know a Trainer's internals."""
