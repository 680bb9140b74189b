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
        syncs: waits of the host for the GPU.
        uploads: copies from memory to the GPU.
    """

    launches: int
    syncs: int
    uploads: int


BUDGETS = {
    "avg_pooling": Budget(75, 1, 3),
    "din": Budget(120, 1, 3),
    "dien": Budget(2360, 1, 3),
    "bst": Budget(251, 1, 3),
    "sim": Budget(186, 1, 3),
    "twin": Budget(167, 1, 3),
    "din+mim": Budget(148, 1, 3),
    "avg_pooling+recommended": Budget(159, 1, 3),
    "din+recommended": Budget(202, 1, 3),
    "dien+recommended": Budget(2444, 1, 3),
    "bst+recommended": Budget(338, 1, 3),
    "sim+recommended": Budget(273, 1, 3),
    "twin+recommended": Budget(251, 1, 3),
    "din+recommended dice": Budget(260, 1, 3),
    "sim+recommended hard": Budget(236, 1, 3),
    "avg_pooling+recommended 2 ranks": Budget(349, 11, 9),
    "din+recommended 2 ranks": Budget(397, 11, 9),
    "dien+recommended 2 ranks": Budget(2649, 11, 9),
    "bst+recommended 2 ranks": Budget(540, 11, 9),
    "sim+recommended 2 ranks": Budget(480, 11, 9),
    "twin+recommended 2 ranks": Budget(448, 11, 9),
    "din+recommended dice 2 ranks": Budget(458, 11, 9),
}
