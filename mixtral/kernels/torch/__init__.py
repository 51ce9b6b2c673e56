"""Ops in torch: the default wherever no native kernel serves."""
