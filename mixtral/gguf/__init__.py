"""GGUF files, below everything that reads them."""
