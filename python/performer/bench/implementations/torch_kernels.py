"""The GPU kernels of performer._core on torch tensors. No TensorFlow."""

from __future__ import annotations

import importlib
import importlib.util

_core = importlib.import_module("performer._core")  # compiled: nothing is known of its names


def missing() -> str:
    """Why the GPU kernels cannot run here, in a sentence, or ""."""
    if not _core.HAS_GPU_KERNELS:
        build = importlib.import_module("performer._build_info")  # written by the build
        return f"this build has no GPU kernels: {build.CUDA_LEFT_OUT}"
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        try:
            _core.gpus()
        except RuntimeError as error:
            return f"no GPU: {error}"
        return f"torch {torch.__version__} sees no GPU"
    return ""


def run(op: str, inputs: dict, *, poison: bool = False, **options) -> dict:
    """Enqueues an operator on the current stream of the tensors' device.

    Args:
        op: "Summarize", "Read", "Causal" or "NearFar", or one of these with "Grad" behind it.
        inputs: tensors by input name, at least those of the operator; `offsets` and `start`, int64
            on the CPU, may be left out, `offsets` unless `packed`.
        poison: fill outputs and workspace with NaN first, so that nothing unwritten can pass.
        **options: attributes of the operator.

    Returns:
        Its outputs, new tensors by name.

    Raises:
        ValueError: a wrong argument.
        MemoryError: no memory on the device.
        RuntimeError: an error of the device or its driver, with CUDA's text.
    """
    import torch

    nothing = torch.zeros(1, dtype=torch.int64)
    given = {"offsets": nothing, "start": nothing[0], **inputs}
    names = [name for name, *_ in _core.signature(op)["inputs"]]
    tensors = {name: given[name].detach().contiguous() for name in names}
    if op.startswith("Read"):
        options.pop("key_norm", None)
    device = tensors[names[0]].device
    for name, tensor in tensors.items():
        on_the_host = name in ("offsets", "start")
        wanted = torch.device("cpu") if on_the_host else device
        if tensor.device != wanted or device.type != "cuda":
            raise ValueError(
                f"{name} must lie on {'the CPU' if on_the_host else 'the GPU of the others'};"
                f" got {tensor.device}"
            )
    workspace = []  # given back when the call is enqueued: torch reuses memory in stream order

    def make_output(shape, dtype):
        out = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        if poison:
            out.fill_(float("nan"))
        return out, out.data_ptr()

    def allocate(size):
        try:
            workspace.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            return 0
        if poison:
            workspace[-1].fill_(255)
        return workspace[-1].data_ptr()

    with torch.cuda.device(device):
        return _core.run_on_gpu(
            op,
            {
                name: (x.data_ptr(), tuple(x.shape), str(x.dtype).removeprefix("torch."))
                for name, x in tensors.items()
            },
            make_output,
            allocate,
            stream=torch.cuda.current_stream().cuda_stream,
            **options,
        )
