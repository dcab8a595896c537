"""Files of JSON: that any reader takes them, and that they appear whole or not at all."""

import json
import math

import pytest

from sparsekit.documents import to_json, write_json, write_whole


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_json_has_no_word_for_is_not_written(value, tmp_path):
    for held in (value, [1.0, value], {"loss": {"of": value}}):
        with pytest.raises(ValueError, match="not JSON compliant"):
            to_json(held)
    path = tmp_path / "report.json"
    path.write_text("before")
    with pytest.raises(ValueError):
        write_whole(path, lambda part: write_json(part, {"loss": value}))
    assert path.read_text() == "before" and [one.name for one in tmp_path.iterdir()] == ["report.json"]


def test_json_is_read_back(tmp_path):
    value = {"b": [1, 2.5, None, True], "a": "text"}
    write_json(tmp_path / "x.json", value, sort_keys=True)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value and text.index('"a"') < text.index('"b"') and text.endswith("}\n")
