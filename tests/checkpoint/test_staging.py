"""An output appears complete or not at all, is never overwritten unasked, and unfinished work is resumed or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.checkpoint import Staging
from burnish.checkpoint.staging import DONE_FILE, STATE_FILE, hash_file, refuse_existing
from burnish.errors import OutputError, ResumeMismatchError

FINGERPRINT: dict[str, Any] = {
    "options": {"score": "sf", "keep": 2, "ridge": None, "seed": 0},
    "plan": None,
    "data": "0123",
    "teacher": {"config.json": "aa", "model.safetensors": "8 bytes"},
    "versions": {"burnish": "1", "torch": "2"},
    "world_size": 1,
}


def with_change(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(FINGERPRINT))
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def finish(staging: Staging, name: str = "a.bin", content: bytes = b"content") -> None:
    (staging.files / name).write_bytes(content)
    staging.finish(name, hash_file(staging.files / name))


def tree(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_output_is_absent_until_publish_and_complete_after_it(tmp_path: Path) -> None:
    out = tmp_path / "some" / "out"
    staging = Staging(out, FINGERPRINT)
    finish(staging)
    (staging.files / "nested").mkdir()
    (staging.files / "nested" / "b.txt").write_text("b")
    (staging.work / "scratch").write_text("not part of the output")
    assert not out.exists()
    staging.publish()
    assert tree(out) == {"a.bin": b"content", "nested/b.txt": b"b"}
    assert list(out.parent.iterdir()) == [out]  # no work is left beside it


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("precious")
    with pytest.raises(OutputError, match=r"out: exists already: choose another name, or pass --overwrite"):
        Staging(out, FINGERPRINT)
    assert tree(tmp_path) == {"out/precious": b"precious"}


def test_an_empty_directory_is_no_output_but_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    staging = Staging(tmp_path / "out", FINGERPRINT)
    finish(staging)
    staging.publish()
    assert tree(tmp_path) == {"out/a.bin": b"content"}
    (tmp_path / "file").write_text("")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="is a file, expected a directory name"):
            refuse_existing(tmp_path / "file", overwrite=overwrite)


def test_overwrite_replaces_the_whole_output_and_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    staging = Staging(out, FINGERPRINT, overwrite=True)
    finish(staging)
    assert tree(out) == {"old": b"old"}
    staging.publish()
    assert tree(tmp_path) == {"out/a.bin": b"content"}


def test_a_place_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"\.out\.partial: cannot be created \(Not a directory\)"):
        Staging(tmp_path / "file" / "out", FINGERPRINT)


def test_u2_1_finished_work_is_found_again(tmp_path: Path) -> None:
    finish(Staging(tmp_path / "out", FINGERPRINT))
    again = Staging(tmp_path / "out", FINGERPRINT)
    assert again.verified("a.bin")
    assert not again.verified("b.bin")
    assert list(again.finished()) == ["a.bin"]


@pytest.mark.parametrize("damage", ["corrupt", "shorten", "remove"])
def test_u2_1_a_finished_file_that_was_damaged_is_not_trusted(damage: str, tmp_path: Path) -> None:
    finish(Staging(tmp_path / "out", FINGERPRINT))
    again = Staging(tmp_path / "out", FINGERPRINT)
    file = again.files / "a.bin"
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(b"cXntent" if damage == "corrupt" else b"conten")
    assert not again.verified("a.bin")


CHANGES = [
    (("options", "score"), "'sf'", "pp", "'pp'"),
    (("options", "keep"), "2", 3, "3"),
    (("options", "ridge"), "None", 0.5, "0.5"),
    (("options", "seed"), "0", 1, "1"),
    (("plan",), "None", "{}", "'{}'"),
    (("data",), "'0123'", "4567", "'4567'"),
    (("teacher", "config.json"), "'aa'", "bb", "'bb'"),
    (("teacher", "model.safetensors"), "'8 bytes'", "9 bytes", "'9 bytes'"),
    (("teacher", "added.txt"), "None", "cc", "'cc'"),
    (("versions", "torch"), "'2'", "3", "'3'"),
    (("world_size",), "1", 2, "2"),
]


@pytest.mark.parametrize(("path", "old", "value", "new"), CHANGES, ids=[".".join(path) for path, *_ in CHANGES])
def test_u2_2_a_changed_field_is_named_with_both_values(
    path: tuple[str, ...], old: str, value: Any, new: str, tmp_path: Path
) -> None:
    finish(Staging(tmp_path / "out", FINGERPRINT))
    before = tree(tmp_path)
    with pytest.raises(ResumeMismatchError) as error:
        Staging(tmp_path / "out", with_change(path, value))
    assert f": {'.'.join(path)} was {old}, is {new}: pass --overwrite to start anew" in str(error.value)
    assert tree(tmp_path) == before


def test_u2_2_a_field_that_is_gone_is_named(tmp_path: Path) -> None:
    Staging(tmp_path / "out", with_change(("teacher", "added.txt"), "cc"))
    with pytest.raises(ResumeMismatchError, match=r"teacher\.added\.txt was 'cc', is None"):
        Staging(tmp_path / "out", FINGERPRINT)


def test_u2_2_many_and_long_differences_stay_one_readable_line(tmp_path: Path) -> None:
    Staging(tmp_path / "out", {f"field{i}": "a\n" * 5000 for i in range(9)})
    with pytest.raises(ResumeMismatchError) as error:
        Staging(tmp_path / "out", {f"field{i}": "a\n" * 5000 + "b" for i in range(9)})
    message = str(error.value)
    assert "field0 was" in message and "field2 was" in message and "and 6 more" in message
    assert len(message) < 2000 and "\n" not in message
    was, now = message.partition("field0 was ")[2].partition(";")[0].split(", is ")
    assert was != now  # the values differ far behind the part that is shown


def test_u2_2_overwrite_discards_work_of_other_inputs(tmp_path: Path) -> None:
    finish(Staging(tmp_path / "out", FINGERPRINT))
    other = with_change(("options", "score"), "pp")
    anew = Staging(tmp_path / "out", other, overwrite=True)
    assert anew.finished() == {}
    assert tree(anew.files) == {}
    assert json.loads((anew.path / STATE_FILE).read_text()) == other


def test_no_resume_discards_work_of_the_same_inputs(tmp_path: Path) -> None:
    finish(Staging(tmp_path / "out", FINGERPRINT))
    assert Staging(tmp_path / "out", FINGERPRINT, resume=False).finished() == {}


@pytest.mark.parametrize("state", [None, b"", b'{"options": {"sco'])
def test_work_that_was_killed_before_its_first_mark_is_started_anew(state: bytes | None, tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", FINGERPRINT)
    finish(staging)
    if state is None:
        (staging.path / STATE_FILE).unlink()
    else:
        (staging.path / STATE_FILE).write_bytes(state)
    again = Staging(tmp_path / "out", FINGERPRINT)
    assert again.finished() == {}
    assert tree(again.files) == {}


def test_what_was_killed_after_its_last_mark_binds_nobody(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "out", FINGERPRINT)
    finish(staging)
    staging.files.rename(staging.out)  # killed inside `publish`, before the work directory was removed
    other = with_change(("options", "score"), "pp")
    staging.out.rename(tmp_path / "moved")
    assert Staging(tmp_path / "out", other).finished() == {}


def test_publish_that_was_killed_between_its_two_renames_is_completed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    finish(Staging(out, FINGERPRINT, overwrite=True))
    out.rename(tmp_path / ".out.old")
    staging = Staging(out, FINGERPRINT, overwrite=True)
    assert staging.verified("a.bin")
    staging.publish()
    assert tree(tmp_path) == {"out/a.bin": b"content"}


def test_marks_are_replaced_and_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging = Staging(tmp_path / "out", FINGERPRINT)
    finish(staging)
    before = (staging.path / DONE_FILE).read_bytes()

    def power_cut(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", power_cut)
    with pytest.raises(KeyboardInterrupt):
        staging.finish("b.bin", "00")
    assert (staging.path / DONE_FILE).read_bytes() == before
