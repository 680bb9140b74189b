"""Progress of RIM: the name of a window holds the positions that it reaches in the source.

Publishing a window and recording that its items were read are therefore one step. An item goes into exactly
one window, whichever process is killed.
"""

from collections.abc import Iterable

from mim_torchrec.embeddings.windows.progress import name_of
from mim_torchrec.rim.sources import Arrival


def window_name(arrivals: Iterable[Arrival]) -> str:
    """Name of a window of arrivals, in the order they came.

    >>> one = Arrival(unit="a.parquet", position="3", place="")
    >>> window_name([one])
    'rim:{"a.parquet": "3"}'
    """
    return name_of({arrival.unit: arrival.position for arrival in arrivals})
