"""What one BatchNorm layer can do: find layers, give an existing layer a behavior, take it back."""
