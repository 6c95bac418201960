"""The benchmark: attention by this package and by its peers, checked before it is timed.

    cases, sides                           sizes and operation counts; who takes part
    compositions                           plain TensorFlow, to compare with
    tensorflow_calls, torch_calls          the sides as functions of tensors
    expected, checking                     what each side must return, in float64
    timing, memory, decode                 the measurements
    worker, processes                      each framework and number of threads in its own process
    plan                                   which cases
    results, tables, render, plots         what the figures say, in words and pictures
    run, command                           the whole of it

Knowledge runs from the last line to the first.
"""
