"""What one BatchNorm layer can do: find layers, attach a behavior to a layer, detach it."""
