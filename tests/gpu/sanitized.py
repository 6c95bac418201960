"""Small calls of every operator on the GPU, for compute-sanitizer: outputs are not looked at."""

from performer.bench.implementations import torch_kernels
from support.cases import GPU_CASES, gpu_dtypes
from support.gpu_calls import ON_THE_HOST, has_small_blocks, to_torch
from support.inputs import cotangents, make

NAMES = (
    "narrow, 128 features, entry std 3",
    "wide, two blocks of features",
    "of 256, two blocks of features",
    "values wider than keys, rows that are not aligned",
    "packed, splits of some sequences",
)


def main() -> None:
    """Runs them; memory is left as it is given, so that what is not written shows."""
    import torch

    for name in NAMES:
        case = GPU_CASES[name]
        if max(case.dim, case.value_dim) > 64 and has_small_blocks():
            print(f"sanitized: left out, too wide for this GPU's shared memory: {name}")
            continue
        for dtype in gpu_dtypes(case):
            arrays = {**make(case, dtype), **cotangents(case, dtype)}
            x = {n: to_torch(a, on_the_host=n in ON_THE_HOST) for n, a in arrays.items()}
            for causal in (False, True):
                options = {**case.options, "exact_window": 40, "causal": causal}
                results = torch_kernels.run("NearFar", x, **options)
                torch_kernels.run("NearFarGrad", {**x, **results}, **options)
            for ops in (
                ("Summarize", "Read", "ReadGrad", "SummarizeGrad"),
                ("Causal", "CausalGrad"),
            ):
                results = dict(x)
                for op in ops:
                    results.update(torch_kernels.run(op, results, **case.options))
            torch.cuda.synchronize()
    print("sanitized: every operator ran")


if __name__ == "__main__":
    main()
