import ml_collections
import pytest

from ggsd_jax.run import _claim, differences, write_json


def test_differences_name_nested_fields_and_both_values():
    old = {"a": 1, "b": {"c": 2, "d": 3}}
    new = {"a": 1, "b": {"c": 5, "e": 3}}
    assert differences(old, new) == {"b.c": (2, 5), "b.d": (3, None), "b.e": (None, 3)}


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n "a": 1\n}'


def test_a_field_can_be_mended_until_training_has_begun(tmp_path):
    for root in ("/nope", "/data"):
        _claim(tmp_path, ml_collections.ConfigDict({"root": root}))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="root is '/data' there and '/nope' here"):
        _claim(tmp_path, ml_collections.ConfigDict({"root": "/nope"}))
