"""`mixtral doctor`: what this machine is and can do, what is installed, and which kernel every op will use."""

from __future__ import annotations

import importlib.metadata
import json
from typing import TYPE_CHECKING, Any

from mixtral.commands.common import JsonOption, ThreadsOption, bytes_text, console, print_table, rate_text, working

if TYPE_CHECKING:
    import torch
    from rich.table import Table

CORE = ("torch", "numpy", "safetensors", "sentencepiece", "tokenizers", "mistral-common", "rich", "typer")
EXTRAS = {  # as pyproject.toml has them; a test compares
    "server": ("fastapi", "uvicorn", "prometheus-client", "llguidance"),
    "eval": ("lm-eval",),
    "data": ("pyarrow", "datasets"),
    "plots": ("matplotlib",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "gguf": ("gguf",),
    "hub": ("huggingface_hub",),
    "notebook": ("notebook", "matplotlib"),
    "tasks": ("reasoning-gym",),
    "dev": (
        "transformers", "pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "pyarrow", "matplotlib", "datasets",
        "tensorboard", "gguf", "huggingface_hub",
    ),
}
GENERATES = (
    "by the native step, on a CPU: models of Mixtral's own router, in fp32, fp16 or bf16 as their files are, and "
    "quantised ones; others by torch, on packed weights"
)
COST = (  # of a missing native library, as measured on two cores (docs/kernels.md)
    "products with packed weights expand the matrix each time, and decoding goes op by op through torch, which reads "
    "weights at a third to a half of the memory's speed"
)


def doctor(threads: ThreadsOption = "auto", as_json: JsonOption = False) -> None:
    """Show the device, its measured speed, and each op's kernel.

    Measures memory bandwidth and matrix products for some seconds. Each is what this process gets now: on a machine
    shared with others it varies.

    Examples:
    mixtral doctor
    mixtral doctor --json
    """
    from mixtral.runtime import set_threads

    set_threads(threads)
    with working("measuring"):
        report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)


def examine() -> dict[str, Any]:
    """Everything that `mixtral doctor` reports, as JSON's types; dtypes by the names that torch gives them."""
    import torch

    from mixtral import hardware, kernels, runtime, system

    device = runtime.choose_device()
    default = runtime.choose_dtype(None, device)
    dtypes = (torch.float32, torch.bfloat16)
    return {
        "device": device.type,
        "memory_bytes": system.available_memory_bytes(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "dtype": _name(default),
        "dtype_reason": _why(default),
        "bandwidth_bytes_per_second": hardware.measure_bandwidth(device),
        "matmul_flops_per_second": {_name(d): hardware.measure_matmul(d, device) for d in dtypes},
        "environment": runtime.environment(device),
        "packages": {name: _version(name) for name in CORE},
        "extras": {extra: {name: _version(name) for name in names} for extra, names in EXTRAS.items()},
        "native": _native(),
        "ops": {op: {_name(d): _kernel(op, device, d) for d in dtypes} for op in kernels.ops()},
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _why(default: torch.dtype) -> str:
    if _name(default) == "bfloat16":
        return "this device multiplies bf16 matrices in hardware"
    return "this device has no fast bf16 (a CPU needs AVX-512 BF16 or AMX, a GPU compute capability 8)"


def _gpu(index: int) -> dict[str, Any]:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return {"name": torch.cuda.get_device_name(index), "memory_bytes": total, "free_bytes": free}


def _version(package: str) -> str | None:
    """The installed version, found without importing the package; None when it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernel(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    from mixtral import kernels

    choice = kernels.choose(op, kernels.Call(device, dtype))
    return {"backend": choice.implementation.backend, "reason": choice.reason}


def _native() -> dict[str, Any]:
    """The C++ library: whether it can be used, and what of the processor it uses; or why not."""
    from mixtral.kernels.native import library as native

    if reason := native.available():
        return {"available": False, "reason": reason, "cost": COST, "remedy": native.REMEDY}
    return {"available": True, "instruction_set": native.instruction_set(), "generates": GENERATES}


# -- for people --------------------------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    out = console()
    out.print("Machine", style="bold")
    print_table(out, _machine(report))
    out.print("\nVersions", style="bold")
    packages = {"python": report["environment"]["python"], **report["packages"]}
    out.print(", ".join(f"{name} {version or 'missing'}" for name, version in packages.items()))
    out.print("\nOptional packages", style="bold")
    print_table(out, _extras(report["extras"]))
    out.print("\nNative library", style="bold")
    print_table(out, _native_table(report["native"]))
    out.print("\nKernel of each op", style="bold")
    print_table(out, _ops(report["ops"], report["dtype"]))


def _machine(report: dict[str, Any]) -> Table:
    from rich.table import Table

    environment = report["environment"]
    commit = f", commit {environment['commit'][:8]}" if environment["commit"] else ""
    rates = ", ".join(f"{rate_text(rate, 'FLOP/s')} in {d}" for d, rate in report["matmul_flops_per_second"].items())
    table = Table.grid(padding=(0, 3, 0, 0))
    table.add_row("mixtral", environment["mixtral"] + commit + (", changed since" if environment["dirty"] else ""))
    table.add_row("device", f"{report['device']}: {environment['hardware']}")
    table.add_row("threads", str(environment["threads"]))
    table.add_row("memory", f"{bytes_text(report['memory_bytes'])} available")
    for gpu in report["gpus"]:
        free = f"{bytes_text(gpu['free_bytes'])} of {bytes_text(gpu['memory_bytes'])} free"
        table.add_row("GPU", f"{gpu['name']}, {free}")
    table.add_row("default dtype", f"{report['dtype']}: {report['dtype_reason']}")
    table.add_row("bandwidth", f"{rate_text(report['bandwidth_bytes_per_second'], 'B/s')} reading memory, measured now")
    table.add_row("peak matmul", f"{rates}, measured now")
    return table


def _extras(extras: dict[str, dict[str, str | None]]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 3, 0, 0))
    for extra, packages in extras.items():
        missing = [name for name, version in packages.items() if version is None]
        if missing:
            table.add_row(extra, f'pip install "mixtral[{extra}]" adds {", ".join(missing)}')
        else:
            table.add_row(extra, ", ".join(f"{name} {version}" for name, version in packages.items()))
    return table


def _native_table(native: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 3, 0, 0))
    if native["available"]:
        table.add_row("in use", f"instruction set {native['instruction_set']}")
        table.add_row("generates", native["generates"])
        return table
    for name in ("reason", "cost", "remedy"):
        table.add_row("missing" if name == "reason" else name, native[name])
    return table


def _ops(ops: dict[str, dict[str, dict[str, str]]], default: str) -> Table:
    """A row an op; the reason is the default dtype's, and the other dtype's too where its backend is another."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False)
    dtypes = list(next(iter(ops.values())))
    for name in ("op", *dtypes, "why"):
        table.add_column(name)
    for op, by_dtype in ops.items():
        reasons = {d: c["reason"] for d, c in by_dtype.items() if c["reason"] != by_dtype[default]["reason"]}
        others = (f"{d}: {reason}" for d, reason in reasons.items())
        table.add_row(op, *(c["backend"] for c in by_dtype.values()), "; ".join([by_dtype[default]["reason"], *others]))
    return table
