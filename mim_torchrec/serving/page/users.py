"""The users of a log, found by parts of their ids: of each, the newest request by time."""

import threading
from itertools import islice
from typing import NamedTuple

from mim_torchrec.data.features import Features
from mim_torchrec.data.schema import Dataset
from mim_torchrec.serving.logged import Log, LoggedRequest

ROWS = 20_000
"""Requests that users are looked for in."""


class _Newest(NamedTuple):
    time: int
    number: int
    behaviors: int


class Users:
    """Users of the test split who have behaviors, in the order of the log.

    Args:
        dataset: the data set.
        features: of the model that is asked about them.

    Raises:
        DataError: a file is malformed, or lacks a column that the features name.
    """

    def __init__(self, dataset: Dataset, features: Features) -> None:
        self.features = features
        self._log = Log(dataset, "test", features)
        self._reading = threading.Lock()
        self._newest: dict[str, _Newest] = {}
        for number, one in enumerate(islice(self._log, ROWS)):
            if len(one.behaviors):
                # ids are text for the page: JavaScript would round large integers
                user = one.known_as("user_id")
                found = _Newest(one.request_ts or 0, number, len(one.behaviors))  # without times, by number
                self._newest[user] = max(found, self._newest.get(user, found))

    def __len__(self) -> int:
        return len(self._newest)

    def search(self, text: str, most: int) -> list[dict[str, str | int]]:
        """Users whose ids hold a text, those first that begin with it.

        Args:
            text: part of an id; all ids hold the empty one.
            most: users that are returned.

        Returns:
            Of each `user_id` and `behaviors`, their number.
        """
        found = sorted((user for user in self._newest if text in user),
                       key=lambda user: (user != text, not user.startswith(text)))  # fmt: skip
        return [{"user_id": user, "behaviors": self._newest[user].behaviors} for user in found[:most]]

    def request_of(self, user: str) -> LoggedRequest:
        """The newest request of a user by time; of several at one time, or without times, the later row.

        Raises:
            KeyError: there is no such user.
            DataError: the file has changed or is damaged.
        """
        number = self._newest[user].number
        with self._reading:  # one reader has one file open
            return self._log[number]
