"""Times of calls on the GPU, and the rates that they are compared with."""

from __future__ import annotations

import statistics
import time

WARM_UP, LEAST, MOST = 3, 5, 50
SECONDS = 0.25  # about how long one call is repeated
PRODUCT_SIZE = 8192
COPY_BYTES = 2**30


class Timer:
    """Milliseconds of calls, by CUDA events.

    Each call is captured as a CUDA graph, so that what Python spends on a launch is not counted;
    where that fails it is timed as it is. Before each repetition a buffer larger than the L2 cache
    is written.

    Attributes:
        stream: what is timed, and what it was made from, must run on it: torch's gradients run on
            the stream of their forward pass, and only this one is captured.
    """

    def __init__(self):
        import torch

        self.torch = torch
        self.stream = torch.cuda.Stream()
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.empty(max(4 * cache, 2**28), dtype=torch.uint8, device="cuda")

    def milliseconds(self, call) -> dict:
        """Median and minimum of one call, how often it ran, and whether as a graph."""
        torch = self.torch
        for _ in range(WARM_UP):
            call()
        torch.cuda.synchronize()
        replay, graph = self._captured(call)
        start = time.perf_counter()
        replay()
        torch.cuda.synchronize()
        repeats = int(SECONDS / max(time.perf_counter() - start, 1e-6))
        samples = []
        for _ in range(min(max(repeats, LEAST), MOST)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            begin.record()
            replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(begin.elapsed_time(end))
        return {
            "median": statistics.median(samples),
            "minimum": min(samples),
            "repeats": len(samples),
            "graph": graph,
        }

    def _captured(self, call):
        torch = self.torch
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                kept = call()  # its memory belongs to the graph
        except RuntimeError:
            torch.cuda.synchronize()
            return call, False
        return lambda kept=kept: graph.replay(), True

    def rates(self) -> dict:
        """bfloat16 products of 8192 x 8192 in TFLOP/s, and copies in GB/s (read and written)."""
        torch = self.torch
        with torch.cuda.stream(self.stream):
            return self._rates()

    def _rates(self) -> dict:
        torch = self.torch
        a, b = (
            torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16)
            for _ in range(2)
        )
        product = self.milliseconds(lambda: torch.matmul(a, b))["minimum"]
        source, target = (
            torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)
        )
        copy = self.milliseconds(lambda: target.copy_(source))["minimum"]
        return {
            "product": 2.0 * PRODUCT_SIZE**3 / product / 1e9,
            "copy": 2.0 * COPY_BYTES / copy / 1e6,
        }
