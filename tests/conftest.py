"""Shared by all tests: a fixed thread count, so that results repeat and two workers do not fight over the cores."""

from __future__ import annotations

import os

# Before torch is loaded, and for the processes that tests start. Waiting threads sleep at once: cores are few.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no fault of the code
hypothesis.settings.load_profile("tests")
