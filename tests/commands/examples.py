"""The shortest use of each command, for tests that go over all of them. A new command needs a line here."""

from __future__ import annotations

# What a command needs to get as far as its options, {model} and {run} being folders; all that it writes goes to {new}.
BASE: dict[str, list[str]] = {
    "demo": [],
    "doctor": [],
    "info": ["tiny"],
    "train": ["tiny", "--show"],
    "runs": ["{run}"],
    "generate": ["--model", "{model}", "--prompt", "To be", "--max-tokens", "2"],
    "score": ["-", "--model", "{model}"],
    "chat": ["--model", "{model}", "--max-tokens", "2"],
    "pull": ["tiny"],  # no name of a hub's: refused before anything is asked
    "convert": ["{model}", "{new}", "--to", "hf"],
    "quantize": ["{model}", "{new}", "--bits", "4"],
    "synth": ["tiny", "{new}", "--bits", "4"],
}
