"""Puts the repository on the path; without a GPU, Triton kernels run in Triton's interpreter."""
import os
import pathlib
import sys

import torch

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
