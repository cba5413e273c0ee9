"""A row's identity and split: pure functions of what it says."""

import re
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from storage.rows import Row, Split, derive_split, normalise


def row(question: str = "When do you open?", **fields: str) -> Row:
    return Row(**{"id": "1", "task": "hours", "question": question, "answer": "At nine.", **fields})  # type: ignore[arg-type]


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)))
def test_the_fast_path_for_plain_text_says_what_the_long_way_says(text: str) -> None:
    long_way = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
    assert normalise(text) == long_way


def test_spacing_case_and_compatibility_forms_do_not_make_another_row() -> None:
    same = [
        "When do you open?",
        "  when DO you\topen?\n",
        "When do you open?",
        "Ｗhen do you open?",
        "When do you\u200b open?",
    ]
    assert len({row(text).key for text in same}) == 1
    assert len({row(text).question_key for text in same}) == 1


def test_characters_without_a_shape_make_no_other_row() -> None:
    invisible = ["\u200d", "\u00ad", "\ufeff", "\x00", "\x1b", "\x85", "\ud800"]
    assert all(normalise(f"a{c}b") in ("ab", "a b") for c in invisible)
    assert normalise("👩\u200d🚀") == "👩🚀"


def test_a_character_that_unicode_may_yet_assign_is_kept() -> None:
    """A newer Python knows newer characters; the same row must not get another hash and split by that."""
    unassigned, private = "\u0378", "\ue000"
    assert [unicodedata.category(c) for c in (unassigned, private)] == ["Cn", "Co"]
    assert normalise(f"A{unassigned}b{private}") == f"a{unassigned}b{private}"


def test_the_separator_of_fields_cannot_survive_in_one() -> None:
    assert "\x1f" not in normalise("a\x1fb") + normalise("é\x1fb\u0378\x1f")
    assert row("b", context="a").key != row("a\x1fb").key


def test_fields_cannot_imitate_each_other() -> None:
    assert row("a b", context="c").key != row("b", context="c a").key
    assert row("q", task="a", context="b").key != row("q", task="b", context="a").key


def test_the_split_does_not_depend_on_task_or_answer() -> None:
    assert row(task="a").words_key == row(task="b", answer="At ten.").words_key


def test_shares_are_kept_on_many_questions() -> None:
    splits = [derive_split(row(f"question {n}").words_key, validation=0.1, suite=0.15) for n in range(4000)]
    assert abs(splits.count(Split.SUITE) / 4000 - 0.15) < 0.02
    assert abs(splits.count(Split.VALIDATION) / 4000 - 0.1) < 0.02


def test_a_larger_suite_share_never_moves_a_suite_row_back() -> None:
    keys = [row(f"question {n}").words_key for n in range(500)]
    small = {key for key in keys if derive_split(key, validation=0.1, suite=0.1) is Split.SUITE}
    large = {key for key in keys if derive_split(key, validation=0.1, suite=0.2) is Split.SUITE}
    assert small < large
