"""ModelFolder: where a model lies, and what its small files say, each read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtral.config import ModelConfig
from mixtral.config.formats import read_config
from mixtral.engine import recommended, within_vocabulary
from mixtral.files import read_once
from mixtral.quant.scheme import QuantScheme, read_scheme
from mixtral.shipped import model_folder
from mixtral.tokenizer import Tokenizer
from mixtral.tokenizer.gguf import side_files
from mixtral.tokenizer.load import find_tokenizer
from mixtral.weights.convert import with_token_ids
from mixtral.weights.load import Opened, open_weights


class ModelFolder:
    """A model folder (Hugging Face's, Mistral's or quantised) or GGUF file, or the shipped model by its name.

    What fails raises as it does alone (`read_config`, `open_weights`, `load_tokenizer`, ...): configuration and headers
    of weights before the vocabulary, which takes far longer to read.

    Attributes:
        path: what the name stands for.
        config: with the tokenizer's begin and end where its own file names none.
        quant_scheme: of a folder that `mixtral quantize` wrote; None for others.
        weights: the files of a folder that is not quantised, checked against the configuration; no tensor is read.
        tokenizer: None when there is none that is read.
        sampling_defaults: fields of SamplingParams that the model recommends.
        side_files: the small files that belong to the tokenizer, by name.
    """

    def __init__(self, name: str | Path) -> None:
        with read_once():
            self.path = model_folder(name)
            config = read_config(self.path)
            self.quant_scheme: QuantScheme | None = read_scheme(self.path)
            self.weights: Opened | None = open_weights(self.path, config) if self.quant_scheme is None else None
            self.tokenizer: Tokenizer | None = find_tokenizer(self.path)
            self.sampling_defaults: dict[str, Any] = within_vocabulary(recommended(self.path), config.vocab_size)
            self.side_files = side_files(self.path)
            self.config: ModelConfig = with_token_ids(config, self.path, self.tokenizer)
