"""The main job, end to end: a causal byte-level language model trained on long real text."""
