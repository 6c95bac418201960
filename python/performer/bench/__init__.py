"""The benchmark: attention by this package and by its peers, checked before it is timed.

    cases, sides                    what is measured: sizes and operation counts; who takes part
    compositions, tensorflow_calls,
    torch_calls                     the sides as functions of tensors, framework by framework
    expected, checking              what each side must return, in float64
    timing, memory, decode          the measurements
    worker, processes               each framework, thread count and memory peak in its own process
    plan, run                       which cases, and the whole run
    results, table, markdown, plots what the figures say

Knowledge runs from the last line to the first.
"""
