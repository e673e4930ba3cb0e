"""CLIP's byte-pair tokenizer, from any of the files its vocabulary is distributed in."""

import gzip
import html
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPE

START, END = "<|startoftext|>", "<|endoftext|>"
OPENAI_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2  # how many of its lines CLIP uses
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
    """Text to ids, as `clip.tokenize`; broken encodings are not mended (the reference calls ftfy for that)."""

    def __init__(self, vocabulary: dict[str, int], merges: list[tuple[str, str]]):
        self._bpe = BPE(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>"))
        self._bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._start, self._end = vocabulary[START], vocabulary[END]

    def ids(self, text: str) -> list[int]:
        """Start, the ids of the text, end."""
        plain = html.unescape(html.unescape(text))
        return [self._start, *self._bpe.encode(plain, add_special_tokens=False).ids, self._end]

    def batch(
        self, texts: Sequence[str], context: int
    ) -> tuple[Int32[np.ndarray, "L context"], Int32[np.ndarray, " L"]]:
        """Ids padded with 0 to `context`, and where each text ends.

        Raises:
            ValueError: a text is longer than `context`.
        """
        padded, ends = np.zeros((len(texts), context), np.int32), np.zeros(len(texts), np.int32)
        for row, text in enumerate(texts):
            ids = self.ids(text)
            if len(ids) > context:
                raise ValueError(f"{text!r} has {len(ids)} tokens, CLIP reads {context}: use fewer words")
            padded[row, : len(ids)], ends[row] = ids, len(ids) - 1
        return padded, ends


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face snapshot, or from OpenAI's vocabulary file in the folder.

    Raises:
        FileNotFoundError: none of these files is there.
        ValueError: a file is damaged, or not CLIP's.
    """
    for names, reader in (
        (("vocab.json", "merges.txt"), _read_vocab_and_merges),
        (("tokenizer.json",), _read_tokenizer_json),
        ((OPENAI_FILE,), _read_openai),
    ):
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            try:
                return Tokenizer(*reader(*files))
            except Exception as error:  # damaged files fail in many ways, and the library raises plain Exceptions
                raise ValueError(f"{files[0]}: not CLIP's vocabulary, or damaged ({error}); fetch it again") from error
    raise FileNotFoundError(
        f"{folder}: no tokenizer; expected vocab.json with merges.txt, tokenizer.json, or OpenAI's {OPENAI_FILE}"
    )


def _read_vocab_and_merges(vocab: Path, merges: Path):
    lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return json.loads(vocab.read_text(encoding="utf-8")), pairs


def _read_tokenizer_json(path: Path):
    model = json.loads(path.read_text(encoding="utf-8"))["model"]
    return model["vocab"], [tuple(m.split()) if isinstance(m, str) else tuple(m) for m in model["merges"]]


def _read_openai(path: Path):
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]
    symbols = [chr(code) for code in _byte_symbols()]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def _byte_symbols() -> list[int]:
    """Code points that stand for the 256 bytes, in the order of the vocabulary (GPT-2's): printable ones first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*printable, *range(256, 512 - len(printable))]
