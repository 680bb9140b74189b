r"""Projecting the shorter of two lists that are compared.

By $\langle q, W r \rangle = \langle W^\top q, r \rangle$ either side may be projected. Where a history is
listed for each impression, a batch has one candidate to tens of behaviors. Projecting the candidates then
spares three dense products of all behaviors: one forward, two backward.
"""

from torch import Tensor, nn

from mim_torchrec.ciubm.jagged import Pairs

SPARSE_COST = 8
"""What an element of a product of packed pairs costs on a CPU, in elements of a dense product."""


def compared(queries: Tensor, key: nn.Linear, rows: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Vectors of candidates and of behaviors whose inner products are those of queries and projected rows.

    A GPU always projects the rows: it is bound by its launches, of which both orders have as many.

    Args:
        queries: (sum_candidates, attention_dim).
        key: projects rows from dim to attention_dim, without a bias.
        rows: (sum_behaviors, dim).
        pairs: that are going to be compared.

    Returns:
        Queries and projected rows, or, where that is cheaper, projected queries (sum_candidates, dim) and the
        rows as they are.
    """
    if not rows.is_cuda:
        spared = (rows.shape[0] - queries.shape[0]) * key.in_features * key.out_features
        wider = max(0, key.in_features - key.out_features)
        if spared > SPARSE_COST * pairs.num_pairs * wider:
            return queries @ key.weight, rows
    return queries, key(rows)
