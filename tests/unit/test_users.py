"""Requests of several users: which values are whose, and what is refused."""

import pytest
import torch

from mim_torchrec.data.features import Ids, Numbers
from mim_torchrec.serving.config import Limits
from mim_torchrec.serving.inputs import Input, Whole
from mim_torchrec.serving.messages import BadRequest
from mim_torchrec.serving.users import requests_of

KNOWN = {
    one.name: one
    for one in (
        Input("user_id", Ids(), "request"),
        Input("candidate_item_id", Ids(), "candidate"),
        Input("behavior_item_id", Ids(), "behavior"),
        Input("candidate_price", Numbers(), "candidate"),
        Input("age", Numbers(), "request"),
        Input("likes", Ids(), "request", is_list=True),
        Input("request_ts", Whole(), "request"),
        Input("behavior_ts", Whole(), "behavior"),
    )
}
RAGGED = {
    "user_id": [7, 8, 9],
    "age": [20.0, 30.0, 40.0],
    "candidate.lengths": [1, 3, 2],
    "candidate_item_id": [10, 20, 21, 22, 30, 31],
    "candidate_price": [1.0, 2.0, 2.1, 2.2, 3.0, 3.1],
    "behavior.lengths": [2, 0, 1],
    "behavior_item_id": [11, 12, 13],
    "request_ts": [5, 6, 7],
    "behavior_ts": [4, 5, 7],
    "likes.lengths": [0, 1, 2],
    "likes": [1, 2, 3],
}


def split(values: dict, shapes: dict | None = None, **limits: int):
    tensors = {name: torch.tensor(data) for name, data in values.items()}
    known = {name: [len(data)] for name, data in values.items()} | (shapes or {})
    return requests_of(tensors, known, KNOWN, Limits(**limits))


def test_every_user_gets_their_own_values():
    first, second, third = split(RAGGED)
    assert second.ids["user_id"].tolist() == [8] and second.dense["age"].tolist() == [30.0]
    assert second.ids["candidate_item_id"].tolist() == [20, 21, 22]
    assert second.dense["candidate_price"].tolist() == pytest.approx([2.0, 2.1, 2.2])
    assert [one.ids["behavior_item_id"].tolist() for one in (first, second, third)] == [[11, 12], [], [13]]
    assert [one.behavior_ts.tolist() for one in (first, second, third)] == [[4, 5], [], [7]]
    assert [one.request_ts for one in (first, second, third)] == [5, 6, 7]
    assert [one.ids["likes"].tolist() for one in (first, second, third)] == [[], [1], [2, 3]]


def test_lists_of_one_length_need_no_lengths():
    values = {name: data for name, data in RAGGED.items() if not name.startswith("candidate.")}
    found = split(values, {"candidate_item_id": [3, 2], "candidate_price": [3, 2], "user_id": [3, 1]})
    assert [one.ids["candidate_item_id"].tolist() for one in found] == [[10, 20], [21, 22], [30, 31]]
    flat = split(values, {"candidate_item_id": [3, 2], "candidate_price": [1, 6]})
    assert [one.dense["candidate_price"].tolist() for one in flat] == [
        one.dense["candidate_price"].tolist() for one in found
    ]


def test_one_user_needs_no_lengths_and_may_send_them():
    plain = {"user_id": [7], "candidate_item_id": [1, 2], "behavior_item_id": [3]}
    for more in ({}, {"candidate.lengths": [2]}, {"behavior.lengths": [1]}):
        (one,) = split(plain | more)
        assert one.ids["candidate_item_id"].tolist() == [1, 2] and "candidate.lengths" not in one.ids


@pytest.mark.parametrize(
    ("change", "shapes", "said"),
    [
        ({"candidate.lengths": [1, 3]}, {}, "candidate.lengths has 2 values, and user_id has 3"),
        ({"candidate.lengths": [1, 3, 3]}, {}, "add up to 7, and candidate_item_id has 6"),
        ({"candidate.lengths": [1, 6, -1]}, {}, "candidate.lengths has the value -1"),
        ({"candidate.lengths": [0, 4, 2]}, {}, "the user at 0 has no candidate"),
        ({"behavior.lengths": None}, {}, "behavior.lengths is missing: send how many"),
        ({"likes.lengths": None}, {}, r"or likes in the shape \[3, n\]"),
        ({"likes": None}, {}, "likes.lengths is there without the list"),
        ({"candidate_price": [1.0]}, {}, "candidate_price has 1 values, expected 6"),
        ({"age": [1.0]}, {}, "age has 1 values, expected 3"),
        ({}, {"candidate_price": [3, 2]}, r"has the shape \[3, 2\], and users have 1, 3, 2 values"),
        ({"behavior_ts": [4, 5, 8]}, {}, "a behavior is after its request, of the user at 2"),
        ({"user_id": []}, {}, "user_id has no value"),
        ({"user_id": list(range(65))}, {}, "65 users are more than 64"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, shapes, said):
    values = {name: data for name, data in (RAGGED | change).items() if data is not None}
    with pytest.raises(BadRequest, match=said):
        split(values, shapes)


def test_limits_are_those_of_all_users_together():
    with pytest.raises(BadRequest, match="6 candidates are more than 5"):
        split(RAGGED, max_candidates=5)
    with pytest.raises(BadRequest, match="3 behaviors are more than 2"):
        split(RAGGED, max_behaviors=2)
