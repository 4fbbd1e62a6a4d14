"""Short texts: paths, lists of paths, amounts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replfx.reports.labels import amount, changed, listed, mebibytes, shortened


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (1_180_672, "1.18M"),
        (999_999, "1.00M"),
        (74_976, "75.0k"),
        (99_950, "100k"),
        (3e15, "3,000T"),
    ],
)
def test_amounts_have_three_digits(number, text):
    assert amount(number) == text


@given(st.integers(0, 10**15 - 10**12))
def test_an_amount_is_short_and_right_to_three_digits(number):
    text = amount(number)
    assert len(text) <= 5
    factor = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}.get(text[-1], 1)
    assert float(text.rstrip("kMGT")) * factor == pytest.approx(number, rel=0.0051)  # half a unit of the third digit


def test_bytes_and_changes():
    assert [mebibytes(n) for n in (0, 1000, 2**20, 12_345_678, 2**30)] == ["0.00", "<0.01", "1.00", "11.8", "1,024"]
    assert [changed(4, 3), changed(4, 5)] == ["4 → 3 (−25.0 %)", "4 → 5 (+25.0 %)"]
    assert changed(0, 2**20, mebibytes, " MiB") == "0.00 → 1.00 MiB (+0.0 %)"


@pytest.mark.parametrize(
    ("text", "width", "short"),
    [
        ("blocks.1", 8, "blocks.1"),
        ("encoder.layers.encoder_layer_10", 12, "…er_layer_10"),
        ("transformer.decoder.h.10.mlp", 12, "…h.10.mlp"),
        ("model.decoder.layers.11", 10, "…layers.11"),
    ],
)
def test_paths_are_cut_from_the_left(text, width, short):
    assert shortened(text, width) == short


@given(st.text("ab.0", min_size=1, max_size=30), st.integers(2, 30))
def test_a_shortened_text_fits_and_ends_as_it_did(text, width):
    short = shortened(text, width)
    assert len(short) <= width
    assert text.endswith(short.removeprefix("…"))


@pytest.mark.parametrize(
    ("paths", "text"),
    [
        ([], ""),
        (["norm"], "norm"),
        (["blocks.1"], "blocks.1"),
        (["h.0", "h.1", "h.2"], "h.0, 1, 2"),
        (["h.0", "h.1", "h.2", "h.3"], "h.0–3"),
        (["h.1", "h.3", "h.5", "h.7", "norm"], "h.1, 3 … 7; norm"),
        (["h.1", "h.3", "h.4", "h.7"], "h.1, 3, 4, 7"),
        (["h.1.mlp", "h.2.mlp"], "h.{1, 2}.mlp"),
        (["features[0:3]", "features[3:6]"], "features[0:3]; features[3:6]"),
        (["layer1.0", "layer2.0", "layer2.1"], "layer1.0; layer2.0, 1"),
    ],
)
def test_paths_that_differ_in_a_number_are_written_together(paths, text):
    assert listed(paths) == text
