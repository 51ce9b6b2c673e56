"""Studying how a model routes its tokens."""

from mixtral.analysis.report import expert_legend, load_strip, routing_table, text_by_expert, tokens_by_expert

__all__ = ["expert_legend", "load_strip", "routing_table", "text_by_expert", "tokens_by_expert"]
