"""The users of the page: of each, the newest request of the log, whatever the order of its files."""

from pathlib import Path

import pytest

from mim_torchrec.data.features import Features
from mim_torchrec.data.schema import Dataset
from mim_torchrec.serving.page.users import Users
from tests.datasets import Rows, request_rows, without, write_requests


def newest(root: Path, rows: Rows) -> dict[str, str]:
    """The newest request by user, of a log whose second half is read first."""
    for part, half in enumerate((rows[6:], rows[:6])):
        write_requests(root / "requests" / "test" / f"part-{part}.parquet", half)
    users = Users(Dataset(root), Features())
    found = [str(user["user_id"]) for user in users.search("", 10)]
    return {user: users.request_of(user).known_as("request_id") for user in found}


def test_the_newest_request_is_that_of_the_latest_time(tmp_path):
    assert newest(tmp_path, request_rows()) == {"500": "9", "501": "10", "502": "7", "503": "12"}


@pytest.mark.parametrize("times", ["equal", "none"])
def test_of_requests_of_one_time_the_later_row_is_the_newest(tmp_path, times):
    rows = [row | {"ts": request_rows()[-1]["ts"]} for row in request_rows()]
    rows = without(rows, "ts", "behavior_ts") if times == "none" else rows
    assert newest(tmp_path, rows) == {"500": "5", "501": "2", "502": "3", "503": "4"}
