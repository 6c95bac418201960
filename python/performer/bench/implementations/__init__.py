"""What is compared: the catalogue of implementations, and each framework's as functions."""
