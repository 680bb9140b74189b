"""The dead-letter file of RIM survives a kill in the middle of a line."""

from mim_torchrec.rim.dead_letter import DeadLetterFile
from mim_torchrec.rim.sources import Arrival


def test_a_line_may_be_broken_off_anywhere(tmp_path):
    path = tmp_path / "dead-letter.jsonl"
    found = [(Arrival(unit="u", position="1", place="{é}, row 1"), "a {brace}")]
    DeadLetterFile(path).add(found)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length] + b"\n")
        DeadLetterFile(path).add(found)
        assert len(DeadLetterFile(path)) == 1
