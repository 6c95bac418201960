"""Random features: how they are drawn, what maps they make, and how well they serve."""
