"""Text to training batches: sources, corpora, tokenised shards, packed rows.

Nothing is imported here: the workers that tokenise start in a fraction of a second because they never load torch.
"""
