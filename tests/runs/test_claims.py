"""The claims board: results are appended, the newest counts, and what was not run is shown as such."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.errors import BurnishError
from burnish.runs.claims import board, load_claims, run_claim

SOURCE = """
from burnish.runs.claims import Claim, Measurement
def measure(scratch):
    (scratch / "x").write_text("scratch can be written")
    return Measurement("partly", "41", {"seeds": [0, 1]})
def never(scratch):
    raise AssertionError
one = dict(source="s", statement="t", paper_number="42", setting="u", reproduced_if="v", budget="cpu-minutes")
CLAIMS = [Claim(name="a", measure=measure, **one), Claim(name="b", measure=never, **one)]
"""


def test_results_are_appended_and_the_newest_is_on_the_board(tmp_path: Path) -> None:
    (tmp_path / "paper.py").write_text(SOURCE)
    first = load_claims(tmp_path)["paper"][0]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "paper.jsonl").write_text(json.dumps({"claim": "a", "verdict": "not reproduced"}) + "\n")
    run_claim(first, tmp_path, "paper", tmp_path)
    rows = [(claim.name, result and result["verdict"]) for _, claim, result in board(tmp_path)]
    assert rows == [("a", "partly"), ("b", None)]
    lines = (tmp_path / "results" / "paper.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["details"] == {"seeds": [0, 1]}
    assert {"date", "commit", "environment", "seconds"} <= json.loads(lines[1]).keys()


def test_a_file_without_claims_and_a_missing_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(BurnishError, match=r"empty\.py: defines no CLAIMS"):
        load_claims(tmp_path)
    with pytest.raises(BurnishError, match="no such directory"):
        load_claims(tmp_path / "none")


def test_every_claim_of_the_repository_says_when_it_counts_as_reproduced() -> None:
    for claims in load_claims(Path(__file__).parents[2] / "claims").values():
        assert len({claim.name for claim in claims}) == len(claims)
        for claim in claims:
            assert claim.reproduced_if and claim.setting and claim.source
