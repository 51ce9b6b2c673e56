"""`mixtral convert`: a model folder of any format to one of a given format, its tokenizer's files along with it."""

from __future__ import annotations

import shutil
from pathlib import Path

from mixtral.config_formats import read_config
from mixtral.errors import UsageError, did_you_mean
from mixtral.files import atomic_folder
from mixtral.weights.load import load_state
from mixtral.weights.save import check_free, write_hf, write_mistral

_WRITERS = {"hf": write_hf, "mistral": write_mistral}
_COPIED = (
    *("*.model", "*.model.v*", "tekken.json", "tokenizer*.json", "special_tokens_map.json"),
    *("generation_config.json", "chat_template*"),
)


def convert(src: str | Path, dst: str | Path, to: str) -> None:
    """Write the model in `src` to the new folder `dst` as "hf" or "mistral", in the dtype it has.

    Raises UsageError for an unknown format, a missing source, or a destination that is there and not empty; ConfigError
    and WeightsError as reading does.
    """
    if to not in _WRITERS:
        raise UsageError(f"unknown format {to!r}; {did_you_mean(to, _WRITERS)}")
    check_free(dst)
    config = read_config(src)
    state = load_state(src, config)
    with atomic_folder(dst) as new:
        _WRITERS[to](state, config, new)
        for pattern in _COPIED:
            for file in filter(Path.is_file, Path(src).glob(pattern)):
                shutil.copyfile(file, new / file.name)
