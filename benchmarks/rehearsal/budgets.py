"""What a training step may take on a GPU: budgets that only shrink.

Of 256 candidates, four a request, with histories of up to 50, and embeddings of 16; see `steps.py`. The test
of the rehearsal fails where a step takes more, and where it takes clearly less than its budget.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Of one step.

    Attributes:
        launches: operators that run a kernel.
        syncs: waits of the host for the stream that computes.
        uploads: copies from memory to the GPU.
        asides: waits for streams beside it, on which ids are exchanged; `docs/gpu.md` names them.
    """

    launches: int
    syncs: int
    uploads: int
    asides: int = 0


BUDGETS = {
    "avg_pooling": Budget(75, 1, 3),
    "din": Budget(119, 1, 3),
    "dien": Budget(164, 1, 3),
    "bst": Budget(223, 1, 3),
    "sim": Budget(173, 1, 3),
    "twin": Budget(156, 1, 3),
    "din+mim": Budget(145, 1, 3),
    "avg_pooling+recommended": Budget(147, 1, 3),
    "din+recommended": Budget(189, 1, 3),
    "dien+recommended": Budget(236, 1, 3),
    "bst+recommended": Budget(298, 1, 3),
    "sim+recommended": Budget(248, 1, 3),
    "twin+recommended": Budget(228, 1, 3),
    "din+recommended dice": Budget(247, 1, 3),
    "sim+recommended hard": Budget(213, 1, 3),
    "avg_pooling+recommended 2 ranks": Budget(339, 1, 9, 10),
    "din+recommended 2 ranks": Budget(386, 1, 9, 10),
    "dien+recommended 2 ranks": Budget(443, 1, 9, 10),
    "bst+recommended 2 ranks": Budget(502, 1, 9, 10),
    "sim+recommended 2 ranks": Budget(457, 1, 9, 10),
    "twin+recommended 2 ranks": Budget(427, 1, 9, 10),
    "din+recommended dice 2 ranks": Budget(447, 1, 9, 10),
}

STAGE_BUDGETS = {
    ("pretrain", 1): Budget(840, 1, 1),
    ("csft", 1): Budget(490, 1, 1),
    ("csft with trained towers, bf16", 1): Budget(1190, 1, 1),
    ("csft with FSDP2, bf16", 1): Budget(1345, 1, 1),
    ("csft with FSDP2, bf16", 2): Budget(990, 1, 1),
}
"""Of a training step of stages, by their names in `stages.py` and the number of ranks; of `pretrain` that of
the phase that takes most. In bf16 casts by `torch.autocast` count, too."""
