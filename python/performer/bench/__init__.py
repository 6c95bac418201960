"""The benchmark: attention by this package and by its peers, checked before it is timed.

    cases                          sizes and operation counts
    implementations/               what is compared: the catalogue, and each framework's functions
    expected, checking             what each implementation must return, in float64
    timing, memory, decode         the measurements
    worker, processes              each framework and number of threads in its own process
    plan                           which cases are measured
    report/                        what the figures say, in words and pictures
    run, command                   the whole of it

Each line imports only from the lines above it.
"""
