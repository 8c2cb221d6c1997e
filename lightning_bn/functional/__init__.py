"""The verbs for plain PyTorch users."""
