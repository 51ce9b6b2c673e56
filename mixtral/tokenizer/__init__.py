"""One Tokenizer interface over Mistral's sentencepiece and tekken files, `tokenizer.json`, and own BPE models."""

from mixtral.tokenizer.base import TextStream, Tokenizer
from mixtral.tokenizer.load import load_tokenizer
from mixtral.tokenizer.train import train_bpe

__all__ = ["TextStream", "Tokenizer", "load_tokenizer", "train_bpe"]
