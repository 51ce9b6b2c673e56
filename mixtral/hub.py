"""Models of Hugging Face's hub, or another one, by name: fetched once by `mixtral pull`, then found in its cache.

The huggingface_hub library fetches and keeps; what is here says which files a model needs, whether they fit the disk,
and in one line what went wrong.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mixtral.errors import MixtralError, UsageError, shown

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")  # OWNER/MODEL, or OWNER/MODEL@REVISION
_COUNTED = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.safetensors")
_SMALL = (
    "config.json", "params.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "*.model", "*.model.v*",
)  # fmt: skip
_WEIGHTS = (  # of the first of these of which there is a file, all
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("consolidated.safetensors", "consolidated-*-of-*.safetensors", "consolidated.*.safetensors",
     "consolidated.safetensors.index.json"),
    ("consolidated.*.pt", "consolidated.*.pth"),
    ("packed.safetensors",),
)  # fmt: skip


def is_name(name: str | Path) -> bool:
    """Whether this is written as a model of a hub, and no file or folder of that name is here."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and not os.path.lexists(name)


def split_name(name: str) -> tuple[str, str | None]:
    """OWNER/MODEL@REVISION -> (OWNER/MODEL, REVISION); None where it names none."""
    model, _, revision = name.partition("@")
    return model, revision or None


def pulled(name: str) -> Path | None:
    """The folder of a model in the cache; None where nothing of it is. Raises UsageError where it is not whole."""
    model, revision = split_name(name)
    try:
        library = _library()
        found = library.snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=list(_SMALL))
    except (UsageError, FileNotFoundError, ValueError):  # no library, nothing of it, no name of a hub's
        return None
    folder = Path(found)
    if not _has_weights(folder) or not all(whole.exists() for _, whole in _parts(folder)):
        raise UsageError(f"{name}: was not fetched to the end; `mixtral pull {name}` goes on")
    return folder


def pull(name: str, token: str | None = None, endpoint: str | None = None) -> Path:
    """Fetch the files that a model needs and that are not here yet -> its folder in the cache.

    A file that was cut off begins anew: the library keeps whole ones alone.

    Args:
        token: of an account that may read it; by default what `hf auth login` has kept, or HF_TOKEN.
        endpoint: the hub; by default HF_ENDPOINT, or Hugging Face's.

    Raises UsageError for a name or revision that the hub does not have, or does not show to this token; MixtralError
    where it cannot be reached, or the disk is full.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"pull: OWNER/MODEL or OWNER/MODEL@REVISION is wanted, not {shown(name)}")
    library = _library()
    model, revision = split_name(name)
    where = endpoint or library.constants.ENDPOINT
    try:
        found = library.HfApi(endpoint=endpoint, token=token).model_info(model, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
        files = needed(sizes)
        if not any(map(_is_weights, files)):
            raise UsageError(f"{name}: the hub has no weights of it that are read; safetensors are")
        _check_space(name, {file: sizes[file] for file in files}, Path(library.constants.HF_HUB_CACHE))
        folder = library.snapshot_download(
            model, revision=revision, allow_patterns=files, token=token, endpoint=endpoint, library_name="mixtral"
        )
    except Exception as error:
        raise _reason(error, name, where, library) from error
    for part, whole in _parts(Path(folder)):  # of a process that was killed
        if whole.exists():
            part.unlink(missing_ok=True)
    return Path(folder)


def _parts(snapshot: Path) -> Iterator[tuple[Path, Path]]:
    """What is not fetched to the end of files of a model, and where they will lie."""
    for part in (snapshot.parent.parent / "blobs").glob("*.incomplete"):
        yield part, part.with_name(part.name.partition(".")[0])


def needed(names: Iterable[str]) -> list[str]:
    """Of the files of a model, those that are read: small ones, and the weights in one format."""
    names = sorted(names)
    files = [name for name in names if _matches(name, _SMALL)]
    weights = ([name for name in names if _matches(name, patterns)] for patterns in _WEIGHTS)
    return files + next(filter(None, weights), [])


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".pt", ".pth"))


def _has_weights(folder: Path) -> bool:
    """Whether there are some, and where their names count them all of them."""
    names = {path.name for path in folder.iterdir() if _is_weights(path.name)}
    for match in filter(None, map(_COUNTED.fullmatch, names)):
        stem, count = match["stem"], match["count"]
        if not all(f"{stem}-{number:05d}-of-{count}.safetensors" in names for number in range(1, int(count) + 1)):
            return False
    return bool(names)


def _check_space(name: str, sizes: dict[str, int], cache: Path) -> None:
    """Raise MixtralError where the disk cannot hold what is not in the cache yet."""
    kept = cache / f"models--{split_name(name)[0].replace('/', '--')}"
    have = sum(path.stat().st_size for path in (kept / "blobs").glob("*") if path.suffix != ".incomplete")
    folder = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free, missing = shutil.disk_usage(folder).free, sum(sizes.values()) - have
    if missing > free:
        sizes_text = f"{missing / 1e9:.1f} GB are to be fetched, and {cache} has {free / 1e9:.1f} GB left"
        raise MixtralError(f"{name}: {sizes_text}; HF_HOME names another place for the cache")


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise UsageError('models of a hub need huggingface_hub: pip install "mixtral[hub]"') from error
    return huggingface_hub


def _reason(error: Exception, name: str, hub: str, library: Any) -> MixtralError:
    """What went wrong, as one line."""
    model, revision = split_name(name)
    errors = library.errors
    match error:
        case MixtralError():
            return error
        case errors.GatedRepoError():
            return UsageError(f"{model}: gated; accept its terms at {hub}/{model} and give a --token of that account")
        case errors.RevisionNotFoundError():
            why = f"has no revision {shown(revision)} of it; a branch, tag or commit is wanted"
            return UsageError(f"{model}: {hub} {why}")
        case errors.RepositoryNotFoundError():
            why = "has no such model, or does not show it to this token (HF_TOKEN, --token)"
            return UsageError(f"{model}: {hub} {why}")
        case errors.HfHubHTTPError() if error.response is not None and error.response.status_code in (401, 403):
            return UsageError(f"{model}: {hub} does not take this token (HF_TOKEN, --token)")
        case OSError(errno=errno.ENOSPC):
            return MixtralError(f"{name}: the disk is full; whole files stay, and the next pull goes on from there")
    what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return MixtralError(f"{name}: cannot be fetched from {hub}: {what}; whole files stay, and the next pull goes on")
