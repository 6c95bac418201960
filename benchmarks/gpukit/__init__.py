"""The benchmark of the GPU kernels, without TensorFlow: benchmarks/gpu.py is the command.

    cases                sizes, operation counts, and which cases come first
    timing               the time of a call on the GPU
    implementations      what is compared
    checking             compares each implementation with float64 before it is timed
    report               table, JSON and plot

Each line imports only from the lines above it.
"""
