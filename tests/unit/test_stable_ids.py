"""Ids of text, UUIDs and uint64 have the same numbers everywhere, and no two ids share one unnoticed."""

import hashlib
import uuid
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from mim_torchrec.data.ids import IdCollision, holds_ids, original_ids, stable_ids
from mim_torchrec.data.schema import category_ids
from mim_torchrec.embeddings import stable_ids as module


def naive(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big", signed=True)


TEXTS = ["user-1", "", "Ünïcode ☃", "user-1", None, "123"]
TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", TEXT_TYPES, ids=str)
def test_text_is_hashed_by_its_bytes(kind):
    column = pa.array(TEXTS).cast(kind)
    expected = [None if text is None else naive(text) for text in TEXTS]
    assert stable_ids(column).to_pylist() == expected
    assert stable_ids(pa.chunked_array([column, column])).to_pylist() == expected * 2
    assert original_ids(column).to_pylist() == TEXTS


def test_the_numbers_never_change():
    assert stable_ids(pa.array(["user-1", "a"])).to_pylist() == [naive("user-1"), naive("a")]
    assert naive("a") == 0x40F89E395B66422F


def test_a_uuid_is_hashed_by_its_text_form_however_it_is_stored():
    value = uuid.UUID("A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11")
    stored = pa.array([value.bytes, None], pa.binary(16))
    of_uuids = pa.ExtensionArray.from_storage(pa.uuid(), stored)
    expected = [naive("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"), None]
    for column in (stored, of_uuids, pa.array([str(value), None])):
        assert holds_ids(column.type)
        assert stable_ids(column).to_pylist() == expected
        assert original_ids(column).to_pylist() == [str(value), None]


def test_integers_stay_and_uint64_wraps_around():
    assert stable_ids(pa.array([-3, None, 2**62])).to_pylist() == [-3, None, 2**62]
    unsigned = pa.array([1, 2**63, 2**64 - 1], pa.uint64())
    assert stable_ids(unsigned).to_pylist() == [1, -(2**63), -1]
    assert stable_ids(unsigned.slice(1)).to_pylist() == [-(2**63), -1]
    assert original_ids(unsigned).to_pylist() == [1, 2**63, 2**64 - 1]
    assert stable_ids(pa.array([Decimal(7), None], pa.decimal128(20, 0))).to_pylist() == [7, None]
    assert stable_ids(pa.nulls(2)).to_pylist() == [None, None]


def test_floats_and_fractions_are_no_ids():
    for kind in (pa.float64(), pa.decimal128(10, 2), pa.bool_(), pa.binary(), pa.timestamp("us")):
        assert not holds_ids(kind)
    with pytest.raises(TypeError, match="double holds no ids"):
        stable_ids(pa.array([1.5]))


def test_two_ids_of_one_number_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(module, "_digest", lambda text: text[:1].encode().rjust(8, b"\0"))
    with pytest.raises(IdCollision, match="'beet' and 'bean' have the same 64-bit number"):
        stable_ids(pa.array(["apple", "beet", "cherry", "bean", "beet"]))
    assert len(set(stable_ids(pa.array(["apple", "beet", "apple"])).to_pylist())) == 2


def test_a_repeated_text_of_a_dictionary_is_no_collision():
    repeated = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), pa.array(["a", "b", "a"]))
    assert stable_ids(repeated).to_pylist() == [naive("a"), naive("b"), naive("a")]


def test_categories_have_the_upper_63_bits():
    found = category_ids(pa.array(["lamp", "rug"]))
    assert found.tolist() == [(naive(text) % 2**64) >> 1 for text in ("lamp", "rug")]
    assert found.dtype == np.int64
