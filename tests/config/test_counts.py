"""Counts in sentences."""

from __future__ import annotations

from ldm.config.counts import be, plural


def test_the_number_of_a_count_is_that_of_its_words() -> None:
    said = [plural(count, "picture") for count in (0, 1, 2, 12_000)]
    assert said == ["0 pictures", "1 picture", "2 pictures", "12,000 pictures"]
    assert [plural(count, "image is", "images are") for count in (1, 3)] == ["1 image is", "3 images are"]
    assert [be(count) for count in (0, 1, 2)] == ["are", "is", "are"]
