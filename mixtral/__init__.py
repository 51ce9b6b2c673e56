"""mixtral: sparse mixture-of-experts language models, from text to trained and served."""

__version__ = "0.1.0"
