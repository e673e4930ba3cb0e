"""CLIP's tokenizer: the reference's ids, whichever file the vocabulary comes from."""

import gzip
import json

import numpy as np
import pytest

from ggsd_jax.vision_language import tokenizer


@pytest.fixture(scope="module")
def expected(shared) -> list[dict]:
    return json.loads((shared / "data/clip/tokens_expected.json").read_text(encoding="utf-8"))["rows"]


def test_the_ids_are_those_of_the_reference_tokenizer(shared, expected):
    clip = tokenizer.load(shared / "data/clip")
    assert len(expected) == 430
    for row in expected:
        assert clip.ids(row["text"]) == row["ids"], row["text"]


@pytest.mark.parametrize("merge", ["{} {}".format, lambda a, b: [a, b]])
def test_a_snapshot_holds_the_same_vocabulary(shared, expected, tmp_path, merge):
    vocabulary, merges = tokenizer._read_openai(shared / "data/clip" / tokenizer.OPENAI_FILE)
    model = {"vocab": vocabulary, "merges": [merge(*pair) for pair in merges]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    clip = tokenizer.load(tmp_path)
    assert all(clip.ids(row["text"]) == row["ids"] for row in expected)


def test_vocab_json_and_merges_txt_hold_the_same_vocabulary(shared, expected, tmp_path):
    vocabulary, merges = tokenizer._read_openai(shared / "data/clip" / tokenizer.OPENAI_FILE)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    clip = tokenizer.load(tmp_path)
    assert all(clip.ids(row["text"]) == row["ids"] for row in expected)


def test_a_batch_is_padded_and_says_where_each_text_ends(clip_snapshot):
    clip = tokenizer.load(clip_snapshot())
    ids, ends = clip.batch(["cat", "a b"], context=8)
    np.testing.assert_array_equal(ids[0, : ends[0] + 1], clip.ids("cat"))
    assert ids.shape == (2, 8) and ends.tolist() == [4, 3] and not ids[0, 5:].any()


def test_a_text_too_long_is_refused_by_name(clip_snapshot):
    with pytest.raises(ValueError, match="'wardrobe' has 10 tokens, CLIP reads 9"):
        tokenizer.load(clip_snapshot()).batch(["bed", "wardrobe"], context=9)


def test_a_missing_or_damaged_vocabulary_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer; expected vocab.json with merges.txt"):
        tokenizer.load(tmp_path)
    packed = gzip.compress(b"#version\n" + b"a b\n" * 10)
    for name, content in ((tokenizer.OPENAI_FILE, packed[:-9]), ("tokenizer.json", b'{"model": {"vocab": {}')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}: not CLIP's vocabulary, or damaged"):
            tokenizer.load(tmp_path)
