"""What one BatchNorm layer can do: find layers, give an existing layer a behaviour, take it back."""
