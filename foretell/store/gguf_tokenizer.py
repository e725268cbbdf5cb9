"""A tokenizer out of GGUF metadata: byte-level BPE ("gpt2"), SentencePiece BPE ("llama"), unigram ("t5").

GGUF keeps a vocabulary, token types, and either merges or scores. The pieces around them (normaliser,
splitter, decoder) are those of the Hugging Face tokenizer the file was converted from.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from foretell.errors import DownloadError, ModelFormatError, UnsupportedModelError
from foretell.store.backend import library_errors, probe
from foretell.store.cache import make_folder, publish
from foretell.store.pretokenizers import BEGINNING_WITH_BOS, IGNORING_MERGES, NORMALISED_NFC, byte_level_splitter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer as Backend

_PREFIX: Final = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4
_SPACE: Final = "▁"  # SentencePiece's visible space

Merges = list[tuple[str, str]]


def build_backend(metadata: Mapping[str, Any], path: Path, cache: Path | None) -> Backend | None:
    """The tokenizer described by ``metadata`` of the file ``path``; None when the file has none.

    ``cache`` is a folder for merges that had to be derived (seconds for 262k tokens), or None.
    Raises ModelFormatError (inconsistent metadata) or UnsupportedModelError (another kind of tokenizer).
    """
    kind = metadata.get(f"{_PREFIX}model")
    if kind is None or kind in ("none", "no_vocab"):
        return None
    builders = {"gpt2": _byte_level, "llama": _sentencepiece, "t5": _unigram}
    if kind not in builders:
        raise UnsupportedModelError(
            f"{path.name} has a {str(kind)[:40]!r} tokenizer; supported: {', '.join(builders)}; a folder with "
            "tokenizer.json works too"
        )
    tokens, types = _vocabulary(metadata, path)
    with library_errors(f"what {path.name} holds"), _without_gc():
        backend = builders[kind](metadata, tokens, types, path, cache)
        _add_template(backend, metadata, tokens, kind)
        probe(backend)
    return backend


def _vocabulary(metadata: Mapping[str, Any], path: Path) -> tuple[list[str], list[int]]:
    tokens = metadata.get(f"{_PREFIX}tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise ModelFormatError(f"{path.name} names a tokenizer but holds no tokens; fetch it again")
    types = metadata.get(f"{_PREFIX}token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ModelFormatError(f"{path.name} does not hold one token type per token; fetch it again")
    return tokens, types


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: Path, cache: Path | None
) -> Backend:
    from tokenizers import Tokenizer, decoders, models, normalizers

    pre = str(metadata.get(f"{_PREFIX}pre", "default"))
    merges = _stated_merges(metadata)
    if merges is None:
        raise ModelFormatError(f"{path.name} has a BPE vocabulary without merges; convert it anew")
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in IGNORING_MERGES))
    if pre in NORMALISED_NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = byte_level_splitter(pre)
    backend.decoder = decoders.ByteLevel()
    _add_whole_tokens(backend, tokens, types, spaces_are_normalised=False)
    return backend


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: Path, cache: Path | None
) -> Backend:
    from tokenizers import Tokenizer, decoders, models, normalizers

    # llama.cpp's converter writes the spaces of user-defined tokens as spaces, all others as ▁.
    tokens = [
        token.replace(" ", _SPACE) if kind == _USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = _stated_merges(metadata) or _cached_merges(metadata, tokens, types, vocab, path, cache)
    unknown = metadata.get(f"{_PREFIX}unknown_token_id", 0)
    unknown_text = tokens[unknown] if isinstance(unknown, int) and 0 <= unknown < len(tokens) else None
    backend = Tokenizer(models.BPE(vocab, merges, unk_token=unknown_text, fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get(f"{_PREFIX}add_space_prefix", True))
    spaces = normalizers.Replace(" ", _SPACE)
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    _add_whole_tokens(backend, tokens, types, spaces_are_normalised=not prefix)
    return backend


def _unigram(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int], path: Path, cache: Path | None
) -> Backend:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    scores = _scores(metadata, tokens, path)
    unknown = int(metadata.get(f"{_PREFIX}unknown_token_id", 0))
    backend = Tokenizer(models.Unigram(list(zip(tokens, scores, strict=True)), unknown, False))
    steps: list[Any] = []
    charsmap = bytes(value & 0xFF for value in metadata.get(f"{_PREFIX}precompiled_charsmap", []))
    if len(charsmap) > 4 and int.from_bytes(charsmap[:4], "little") <= len(charsmap) - 4:
        steps.append(normalizers.Precompiled(charsmap))
    if metadata.get(f"{_PREFIX}remove_extra_whitespaces", True):
        steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), _SPACE)]
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if metadata.get(f"{_PREFIX}add_space_prefix", True) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, scheme)
    backend.decoder = decoders.Metaspace(_SPACE, scheme)
    _add_whole_tokens(backend, tokens, types, spaces_are_normalised=False)
    return backend


def _add_whole_tokens(backend: Backend, tokens: list[str], types: list[int], *, spaces_are_normalised: bool) -> None:
    """Makes control tokens special, and user-defined tokens matched whole wherever they occur in a text.

    With a normaliser that only rewrites spaces, user-defined tokens are matched behind it (as SentencePiece
    does), so that both "  " and "▁▁" are the token "▁▁"; one that adds a prefix must not touch them.
    """
    from tokenizers import AddedToken

    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    whole = [token for token, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    if not spaces_are_normalised and backend.normalizer is not None:
        whole = [token for token in whole if _SPACE not in token]  # matched on raw text, where ▁ is a space
    backend.add_tokens([AddedToken(token, normalized=spaces_are_normalised, special=False) for token in whole])


def _add_template(backend: Backend, metadata: Mapping[str, Any], tokens: list[str], kind: str) -> None:
    """BOS and EOS around a text, as the file's flags (or, in files without them, its kind) say."""
    from tokenizers.processors import TemplateProcessing

    pre = metadata.get(f"{_PREFIX}pre")
    wanted = {
        "bos": metadata.get(f"{_PREFIX}add_bos_token", kind == "llama" or pre in BEGINNING_WITH_BOS),
        "eos": metadata.get(f"{_PREFIX}add_eos_token", kind == "t5"),
    }
    special: list[tuple[str, int]] = []
    template = ["$A"]
    for name, add in wanted.items():
        number = metadata.get(f"{_PREFIX}{name}_token_id")
        if add and isinstance(number, int) and 0 <= number < len(tokens):
            special.append((tokens[number], number))
            template = [tokens[number], *template] if name == "bos" else [*template, tokens[number]]
    if special:
        backend.post_processor = TemplateProcessing(single=template, special_tokens=special)


# --- merges ----------------------------------------------------------------------------------------------


def _stated_merges(metadata: Mapping[str, Any]) -> Merges | None:
    stated = metadata.get(f"{_PREFIX}merges")
    if not isinstance(stated, list) or not stated:
        return None
    merges = []
    for merge in stated:
        cut = merge.find(" ", 1)  # a token may itself start with a space
        merges.append((merge[:cut], merge[cut + 1 :]))
    return merges


def _scores(metadata: Mapping[str, Any], tokens: list[str], path: Path) -> list[float]:
    scores = metadata.get(f"{_PREFIX}scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ModelFormatError(f"{path.name} does not hold one score per token; convert it anew")
    return scores


def derive_merges(tokens: list[str], types: list[int], scores: list[float], vocab: Mapping[str, int]) -> list[Any]:
    """Every split of a normal token into two tokens, as id pairs, in the order a SentencePiece BPE merges them.

    SentencePiece merges the pair whose *result* scores best; a rank per pair says the same, with all splits
    of one token side by side, the longest left part first (as Hugging Face's converter orders them).
    """
    found = []
    for number, token in enumerate(tokens):
        if types[number] != _NORMAL:
            continue
        for cut in range(len(token) - 1, 0, -1):
            left = vocab.get(token[:cut])
            if left is not None and (right := vocab.get(token[cut:])) is not None:
                found.append((-scores[number], number, -cut, left, right))
    found.sort()
    return [(left, right) for _, _, _, left, right in found]


def _cached_merges(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    vocab: Mapping[str, int],
    path: Path,
    cache: Path | None,
) -> Merges:
    """Derived merges, from the cache when this very vocabulary was seen before.

    The cache holds id pairs, not a tokenizer.json: parsing Gemma's 33 MB of JSON takes longer than building.
    """
    import numpy

    scores = _scores(metadata, tokens, path)
    file = None
    if cache is not None:
        key = hashlib.sha256("\0".join(tokens).encode("utf-8", "surrogatepass"))
        key.update(numpy.asarray(scores, dtype="<f8").tobytes())
        key.update(numpy.asarray(types, dtype="<i8").tobytes())
        file = cache / f"merges-{key.hexdigest()[:32]}.npy"
    if file is not None and file.is_file():
        with contextlib.suppress(OSError, ValueError, EOFError):
            pairs = numpy.load(file, allow_pickle=False)
            if pairs.ndim == 2 and pairs.shape[1] == 2 and pairs.min() >= 0 and pairs.max() < len(tokens):
                return [(tokens[left], tokens[right]) for left, right in pairs.tolist()]
    derived = derive_merges(tokens, types, scores, vocab)
    if file is not None and derived:
        with contextlib.suppress(OSError, DownloadError):  # a read-only cache costs seconds, not the model
            make_folder(file.parent)
            temporary = file.with_name(f".{os.getpid()}.{file.name}")
            numpy.save(temporary, numpy.asarray(derived, dtype=numpy.int32))
            publish(temporary, file)
    return [(tokens[left], tokens[right]) for left, right in derived]


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Half a million small tuples make the cyclic collector scan for seconds; none of them is in a cycle."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
