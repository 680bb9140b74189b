"""Every test process, and every process it starts, computes on one thread: ranks share few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402 (it reads the environment when it loads)

torch.set_num_threads(1)
