"""How this process runs: device and dtype, threads, and a record of all that beside every result."""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from pathlib import Path

import torch

import mixtral
from mixtral.cores import asked_threads, cpu_count, free_cores, use_threads
from mixtral.errors import UsageError, did_you_mean
from mixtral.hardware import hardware_name, has_fast_bf16

_log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """The device named; for None or "auto" a CUDA GPU when there is one, else the CPU.

    Raises UsageError for a name that is none of cpu, cuda, cuda:N, and for a GPU that is not there.
    """
    if name is None or name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = str(name).partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UsageError(f"device: unknown name {str(name)!r}; known: auto, cpu, cuda, cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise UsageError(f"device: {name} asked for, but torch sees {count} CUDA GPUs here; use cpu or auto")
    return torch.device(str(name))


def choose_dtype(name: str | torch.dtype | None, device: torch.device | str) -> torch.dtype:
    """The dtype named; for None or "auto" bf16 where `device` has it in hardware, else fp32.

    Raises UsageError for an unknown name.
    """
    if name is None or name == "auto":
        return torch.bfloat16 if has_fast_bf16(device) else torch.float32
    if isinstance(name, torch.dtype):
        name = str(name).removeprefix("torch.")
    if name not in DTYPES:
        raise UsageError(f"dtype: unknown name {name!r}; {did_you_mean(name, ['auto', *DTYPES])}")
    return DTYPES[name]


def set_threads(threads: int | str | None = None) -> int:
    """Let this process compute with `threads` threads: torch, the native library, tokenizers. -> the number.

    None and "auto" are OMP_NUM_THREADS where it is set; else None is all cores allowed to us (torch by itself looks at
    the whole machine, and in a container with a quota starts too many), and "auto" those of them that are free just
    now. More threads than cores are a warning: they take turns.

    Raises UsageError for what is no number of threads.
    """
    cores = cpu_count()
    count = asked_threads(threads) or (free_cores() if threads == "auto" else cores)
    if threads == "auto" and count < cores:
        _log.info("%d of %d cores: other processes are busy; OMP_NUM_THREADS or a number decides", count, cores)
    if count > cores and count != torch.get_num_threads():
        _log.warning("%d threads on %d core%s: they take turns, which is slower", count, cores, "s" * (cores > 1))
    torch.set_num_threads(count)
    use_threads(count)
    return count


def environment(device: torch.device | str = "cpu") -> dict[str, str | int | bool | None]:
    """What a result depends on besides its configuration; written beside every result.

    Keys: mixtral, commit (None outside a checkout), dirty (uncommitted changes to tracked files), python, torch,
    platform, hardware, threads.
    """
    commit = _git("rev-parse", "HEAD")
    return {
        "mixtral": mixtral.__version__,
        "commit": commit,
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")) if commit else False,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "platform": platform.platform(),
        "hardware": hardware_name(device),
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str | None:
    """What git prints about the checkout the package lies in; None when it lies in none, or git is missing."""
    top = Path(__file__).parent.parent
    if not (top / ".git").exists():  # an installed package inside somebody else's repository is not that repository
        return None
    try:
        done = subprocess.run(["git", *arguments], cwd=top, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
