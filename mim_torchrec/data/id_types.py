"""Whether the ids of a vocabulary are text or integers in the log; a server tells its clients."""

from collections.abc import Iterable

from mim_torchrec.data.conventions import kind_of
from mim_torchrec.data.id_scan import COLUMNS
from mim_torchrec.data.schema import REQUESTS, REQUESTS_REQUIRED, Dataset, open_parquet

TEXT, INTEGERS = "text", "integers"


def id_types(dataset: Dataset, vocabularies: Iterable[str]) -> dict[str, str]:
    """What the ids of vocabularies are, by the columns of the training requests and by dataset.json.

    Args:
        dataset: that the vocabularies are of.
        vocabularies: their names.

    Returns:
        TEXT or INTEGERS by name. Those whose columns hold only nulls, or neither, are left out.

    Raises:
        DataError: a file is malformed.
    """
    found = {name: TEXT for name in vocabularies if name in dataset.text_ids}
    missing = [name for name in vocabularies if name not in found]
    for file in dataset.requests("train"):
        if not missing:
            break
        schema = open_parquet(file, REQUESTS, REQUESTS_REQUIRED, dataset.conventions).schema_arrow
        for name in missing:
            for column in COLUMNS.get(name, (name,)):
                if (at := schema.get_field_index(column)) >= 0:
                    kind = kind_of(schema.field(at).type)
                    if kind in (TEXT, INTEGERS):
                        found[name] = kind
        missing = [name for name in missing if name not in found]
    return found
