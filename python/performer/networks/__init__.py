"""Published import paths of the layer."""
