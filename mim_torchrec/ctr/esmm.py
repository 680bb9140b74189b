r"""A second label after the click, by the Entire Space Multi-Task Model (ESMM; Ma et al., SIGIR 2018).

A candidate is converted, bought say, only after a click. The second tower predicts pCVR, the probability of a
conversion given a click, and is trained through the product that every impression has a label for:

    pCTCVR = pCTR · pCVR        loss = BCE(pCTR, click) + w · BCE(pCTCVR, click and conversion)

So it learns from all impressions, not from the clicked ones only, of which a server scores the least. Both
towers share embeddings and interests, where ESMM shares embeddings: the interests are ours of the embeddings.
Left out: conversions that are not known yet when a model is trained.
"""

import torch
from torch import Tensor


def joint_logits(click: Tensor, conversion: Tensor) -> Tensor:
    r"""Logits of pCTCVR: $\mathrm{logit}(σ(a) σ(b)) = -\log(e^{-a} + e^{-b} + e^{-a-b})$.

    Args:
        click: (n,) logits of pCTR.
        conversion: (n,) logits of pCVR.

    >>> found = joint_logits(torch.tensor([0.0, 90.0]), torch.tensor([0.0, -90.0]))
    >>> torch.sigmoid(found[0]).item(), found[1].item()
    (0.25, -90.0)
    """
    return -torch.stack([-click, -conversion, -click - conversion]).logsumexp(0)


def second_scores(click: Tensor, conversion: Tensor) -> tuple[Tensor, Tensor]:
    """pCTCVR and pCVR of logits (n,) of pCTR and pCVR, each (n,)."""
    click, conversion = click.float(), conversion.float()
    return torch.sigmoid(joint_logits(click, conversion)), torch.sigmoid(conversion)
