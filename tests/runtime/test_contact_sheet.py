"""Contact sheets, and pictures as addresses in a page."""

import base64
import io

import numpy as np
from PIL import Image

from sepme_diffusers.runtime.contact_sheet import as_data_uri, contact_sheet


def flat(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def test_every_picture_is_placed():
    sheet = contact_sheet([[flat(10), flat(20)], [flat(30), flat(40)]], ["x", "y"], ["a", "b"], scale=2)
    found = set(np.unique(np.asarray(sheet)))
    assert {10, 20, 30, 40} <= found


def test_pictures_need_not_be_square():
    sheet = contact_sheet([[flat(10, (20, 5)), flat(20, (20, 5))]])
    assert np.asarray(sheet)[:5, :20].max() == 10
    assert np.asarray(sheet)[:5, 24:44].max() == 20


def test_a_long_header_is_wrapped_within_its_column():
    low, high = (contact_sheet([[flat(0, (64, 64))]], headers=[text]) for text in ("a", "long words " * 4))
    assert high.width == low.width
    assert high.height > low.height + 30


def test_a_large_picture_is_made_smaller_in_a_page_and_a_small_one_kept_exactly():
    picture = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    small, large = as_data_uri(picture, 8), as_data_uri(picture.resize((800, 400)), 320)
    decoded = [Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) for uri in (small, large)]
    assert np.array_equal(decoded[0], picture)
    assert large.startswith("data:image/jpeg;")
    assert decoded[1].size == (320, 160)
