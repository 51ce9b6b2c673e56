#!/usr/bin/env python3
"""Holds our GGUF files to llama.cpp: `tools/check_llama_cpp.py FOLDER_OF_ITS_PROGRAMS [MODEL]`.

1. A file written here must tokenise and continue greedily there as here, 32 tokens at bf16.
2. Files quantised here and by llama-quantize must hold the same weights for both, bit for bit: those that we read out
   of a file, and those that llama-quantize expands it to.
3. Log-probabilities of both programs on one file must be close: half of all positions within a divergence of 1e-3.
   Where weights are quantised, llama.cpp rounds activations to 8 bits, which now and then moves a token to another
   expert; so the mean is printed and held to nothing. The last column is what the rounding of the file itself moves.

MODEL is a model folder with a sentencepiece tokenizer. Without one a random model is made, wide enough (256) for the K
types; its next tokens hang on the last bit, so that it is not asked to continue. The programs needed are
llama-completion, llama-perplexity and llama-quantize. Takes a minute or two.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import mixtral
from mixtral.config import ModelConfig
from mixtral.config.formats import read_config
from mixtral.gguf.header import read_gguf_header
from mixtral.lm import LM
from mixtral.model import Mixtral, initialise
from mixtral.shipped import model_folder
from mixtral.tokenizer import train_bpe
from mixtral.weights import convert, load_state

TEXT = Path(tempfile.__file__)  # prose and code that every Python has
PROMPT = "The file is removed when"
CONTEXT, CHUNKS = 128, 3
PROGRAMS = ("llama-completion", "llama-perplexity", "llama-quantize")
WRITTEN = ("bf16", "q8_0", "q4_0")
QUANTISED = ("Q8_0", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K")


class LogProbs(NamedTuple):
    """What llama-perplexity --kl-divergence-base writes: the second half of each chunk."""

    tokens: np.ndarray  # [chunks, context]
    values: np.ndarray  # [chunks, context - 1 - context // 2, vocabulary]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", type=Path, help="the folder of llama-completion, llama-perplexity, llama-quantize")
    parser.add_argument("model", nargs="?", type=model_folder, help="a model folder, or mixtral-nano")
    args = parser.parse_args()
    programs: Path = args.programs
    if missing := [name for name in PROGRAMS if not (programs / name).exists()]:
        parser.error(f"{programs}: no {', '.join(missing)} in it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or random_model(folder / "model")
        for type in WRITTEN:
            convert(model, folder / f"{type}.gguf", "gguf", type=type)
        good = [same_greedily(programs, folder / "bf16.gguf")] if args.model else []
        for type in QUANTISED:
            target = folder / f"llama.cpp {type}.gguf"
            run(programs / "llama-quantize", folder / "bf16.gguf", target, type, "1")
        reference = ours(folder / "bf16.gguf", theirs(programs, folder / "bf16.gguf").tokens)
        files = sorted(folder.glob("*.gguf"))
        good += [same_log_probs(programs, file, reference) for file in files]
        good += [same_weights(programs, file) for file in files]
    print("all as it should be" if all(good) else "NOT as it should be")
    return not all(good)


def random_model(folder: Path) -> Path:
    """Weights three times as large as usual, so that its predictions are far from uniform."""
    tokenizer = train_bpe([TEXT.read_text()], 512)
    config = ModelConfig(
        vocab_size=512, dim=256, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=64, ffn_dim=512, n_experts=8,
        experts_per_token=2, rope_theta=1e4, context=512, init_std=0.06,
    )  # fmt: skip
    lm = LM(initialise(Mixtral(config), torch.Generator().manual_seed(0)), tokenizer)
    lm.model.to(torch.bfloat16)
    lm.save(folder)
    return folder


def same_greedily(programs: Path, file: Path) -> bool:
    lm = mixtral.load(file, dtype="bf16", device="cpu")
    here = lm.generate(PROMPT, max_tokens=32, temperature=0.0)
    options = ["-n", "32", "--temp", "0", "-no-cnv", "--no-display-prompt", "--no-warmup", "-t", "1"]
    out = run(programs / "llama-completion", "-m", file, "-p", PROMPT, *options)
    there = out.removesuffix("\n").removesuffix("\n").removesuffix(" [end of text]")
    print(f"greedily, here:  {here!r}\n          there: {there!r}")
    return here.strip() == there.strip()


def same_log_probs(programs: Path, file: Path, reference: np.ndarray) -> bool:
    found = theirs(programs, file)
    mine = ours(file, found.tokens)
    apart, rounding = divergence(found.values, mine), divergence(reference, mine)
    types = sorted({info.type.name for info in read_gguf_header(file).tensors.values()})
    print(f"{file.stem:18} KL between the programs: median {np.median(apart):.1e}, mean {apart.mean():.1e}; "
          f"to bf16: mean {rounding.mean():.1e}; holds {', '.join(types)}")  # fmt: skip
    return bool(np.median(apart) < 1e-3)


def same_weights(programs: Path, file: Path) -> bool:
    expanded = file.with_suffix(".f32.gguf")
    run(programs / "llama-quantize", "--allow-requantize", file, expanded, "F32", "1")
    config = read_config(file)
    mine, their = (load_state(path, config, torch.float32) for path in (file, expanded))
    assert {info.type.name for info in read_gguf_header(expanded).tensors.values()} == {"F32"}
    different = [name for name, tensor in mine.items() if not torch.equal(tensor, their[name])]
    print(f"{file.stem:18} weights: {len(mine) - len(different)} tensors equal, {len(different)} different")
    return not different


def theirs(programs: Path, file: Path) -> LogProbs:
    saved = file.with_suffix(".logits")
    options = ["-c", str(CONTEXT), "-b", str(CONTEXT), "--chunks", str(CHUNKS), "-t", "1", "--no-warmup"]
    run(programs / "llama-perplexity", "-m", file, "-f", TEXT, "--kl-divergence-base", saved, *options)
    data = saved.read_bytes()
    magic, context, vocabulary, chunks = struct.unpack("<8s3i", data[:20])
    assert (magic, context) == (b"_logits_", CONTEXT)
    tokens = np.frombuffer(data, np.int32, context * chunks, 20).reshape(chunks, context)
    rows, width = context - 1 - context // 2, 2 * ((vocabulary + 1) // 2) + 4
    packed = np.frombuffer(data, np.uint16, chunks * rows * width, 20 + tokens.nbytes).reshape(chunks, rows, width)
    scale, least = np.moveaxis(np.ascontiguousarray(packed[..., :4]).view(np.float32), -1, 0)
    return LogProbs(tokens, least[..., None] + scale[..., None] * packed[..., 4 : 4 + vocabulary])


def ours(file: Path, tokens: np.ndarray) -> np.ndarray:
    """The same log-probabilities here, in fp32. Every chunk begins with <s> there, whatever its first token was."""
    lm = mixtral.load(file, dtype="fp32", device="cpu")
    assert lm.tokenizer is not None
    text = lm.tokenizer.encode(TEXT.read_text())[: tokens.size]
    assert text == tokens.flatten().tolist(), "the two tokenise the text differently"
    first = CONTEXT // 2
    rows = [lm.logits([lm.tokenizer.bos_id, *chunk[1:].tolist()])[first:-1].log_softmax(-1) for chunk in tokens]
    return torch.stack(rows).numpy()


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """KL(p || q) at every position."""
    return (np.exp(p) * (p - q)).sum(-1).flatten()


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed: {done.stderr.decode(errors='replace')[-2000:]}")
    return done.stdout.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
