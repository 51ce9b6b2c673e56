"""Shared by all tests: a fixed thread count, so that results repeat and two workers do not fight over the cores."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
