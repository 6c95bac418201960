"""The benchmark of the GPU kernels, without TensorFlow: benchmarks/gpu.py is the command.

cases (sizes, operation counts, which come first), timing (a call on the GPU), sides (who takes
part), checking (each side against float64 before it is timed), report (table, JSON, plot).
Knowledge runs from the last to the first.
"""
