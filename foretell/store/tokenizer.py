"""Text to token ids and back, for whichever tokenizer a model brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from foretell.errors import InvalidRequestError, UnsupportedModelError
from foretell.store.backend import library_errors, probe
from foretell.store.cache import cache_home
from foretell.store.chat_template import ChatTemplate
from foretell.store.detokenize import BYTE_TOKEN, decoding_of, spelled_bytes
from foretell.store.files import read_json
from foretell.store.references import ModelFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

# Texts of tokens that end a document or a turn in the models in use; where a vocabulary marks one of them
# special, generation stops there even if the metadata name only another.
_END_TEXTS: Final = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<end_of_turn>", "<|end|>",
    "<|return|>", "<｜end▁of▁sentence｜>", "<|EOT|>", "[EOT]", "<turn|>",
)  # fmt: skip
_ROLES: Final = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_MAX_TEMPLATE_BYTES: Final = 4 << 20


class Tokenizer:
    """A model's tokenizer: ``encode``, ``decode``, and its chat template.

    ``special_ids`` are the tokens that ``decode`` leaves out by default; ``eos_token_ids`` those that end a
    generation.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        vocab_size: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: frozenset[int] = frozenset(),
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.vocab_size = vocab_size if vocab_size is not None else backend.get_vocab_size()
        self.special_tokens = dict(special_tokens or {})
        self.eos_token_ids = eos_token_ids
        bos = self.special_tokens.get("bos_token")
        self.bos_token_id: int | None = None if bos is None else backend.token_to_id(bos)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.special_texts = frozenset(token.content for token in added.values() if token.special)
        self.decoding = decoding_of(backend)
        self._templates = {
            name: ChatTemplate(source, self.special_tokens) for name, source in (chat_templates or {}).items()
        }

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; ``add_special_tokens`` puts BOS (and EOS) where the model was trained with it.

        The spellings of special tokens in ``text`` become those tokens. InvalidRequestError when the text
        holds lone surrogates, which no UTF-8 spells.
        """
        try:
            # a batch of one: unlike ``encode`` it lets other threads run meanwhile, and it is faster
            batch = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = batch[0].ids
        except (UnicodeEncodeError, TypeError):
            if not isinstance(text, str):
                raise InvalidRequestError(f"the prompt is {type(text).__name__}, not text") from None
            raise InvalidRequestError("the prompt holds lone surrogates; send valid Unicode text") from None
        except Exception as error:  # as a vocabulary does that has neither a token for this nor one for the unknown
            why = (str(error).splitlines() or [""])[0][:200]
            raise InvalidRequestError(f"the model's tokenizer cannot spell this prompt ({why})") from None
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``. Ids without a token are left out; InvalidRequestError for negative ones."""
        try:
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError):
            raise InvalidRequestError("token ids must be whole numbers from 0 to 4294967295") from None
        return text

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (``Ġthe``, ``▁the``, ``<0xE2>``); None for an unused id."""
        try:
            token: str | None = self.backend.id_to_token(token_id)
        except OverflowError:
            return None
        return token

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to the text, as bytes; b"" for an unused id."""
        token = self.token(token_id)
        if token is None:
            return b""
        if self.decoding.kind == "byte-level":
            return spelled_bytes(token)
        if self.decoding.kind == "sentencepiece" and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        return token.replace("▁", " ").encode() if self.decoding.kind != "other" else self.decode([token_id]).encode()

    def token_text(self, token_id: int) -> str:
        """The token for display: its text, with bytes that are no whole character as ``\\xNN``."""
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation; encode it with ``add_special_tokens=False``.

        InvalidRequestError when the model has no template, or its template refuses the messages.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        template = self._templates.get(name)
        if template is None:
            raise InvalidRequestError(
                "this model has no chat template (a base model?); use --raw to send the text as it is"
            )
        return template.render(messages, add_generation_prompt=add_generation_prompt, tools=tools, **kwargs)


def load_tokenizer(files: ModelFiles, *, cache_dir: Path | None = None) -> Tokenizer | None:
    """The tokenizer of ``files``: tokenizer.json, else the GGUF's own; None when there is none (ids in and out).

    Raises ModelFormatError or UnsupportedModelError when there is one that cannot be read.
    """
    if (files.folder / "tokenizer.json").is_file() and files.format != "gguf":
        return _from_folder(files)
    if files.format == "gguf":
        from foretell.store.gguf_header import read_header

        return from_gguf_metadata(read_header(files.path).metadata, files.path, cache_home(cache_dir))
    if (files.folder / "tokenizer.model").is_file():
        raise UnsupportedModelError(
            f"{files.folder} has tokenizer.model but no tokenizer.json; convert it with transformers' "
            "AutoTokenizer.save_pretrained"
        )
    return None


def from_gguf_metadata(metadata: Mapping[str, Any], path: Path, home: Path | None = None) -> Tokenizer | None:
    """The tokenizer in a GGUF's metadata, or None; ``home`` is the cache folder for derived merges."""
    from foretell.store.gguf_tokenizer import build_backend

    backend = build_backend(metadata, path, None if home is None else home / "tokenizers")
    if backend is None:
        return None
    prefix = "tokenizer.ggml."
    tokens: list[str] = metadata[f"{prefix}tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator", "mask": "mask"}
    special = {}
    for role, key in names.items():
        number = metadata.get(f"{prefix}{key}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            special[f"{role}_token"] = tokens[number]
    stated = (metadata.get(f"{prefix}{key}_token_id") for key in ("eos", "eot", "eom"))
    ends = {number for number in stated if isinstance(number, int) and 0 <= number < len(tokens)}
    templates = {"default": metadata["tokenizer.chat_template"]} if "tokenizer.chat_template" in metadata else {}
    prefixed = "tokenizer.chat_template."
    templates |= {key.removeprefix(prefixed): text for key, text in metadata.items() if key.startswith(prefixed)}
    return Tokenizer(
        backend,
        vocab_size=len(tokens),
        special_tokens=special,
        eos_token_ids=frozenset(ends | _end_ids(backend)),
        chat_templates={name: text for name, text in templates.items() if isinstance(text, str)},
    )


def _from_folder(files: ModelFiles) -> Tokenizer:
    from tokenizers import Tokenizer as BackendClass

    folder = files.folder
    config = read_json(folder / "tokenizer_config.json") or {}
    special_map = read_json(folder / "special_tokens_map.json") or {}
    special = _special_tokens(special_map) | _special_tokens(config)
    with library_errors(str(folder / "tokenizer.json")):
        backend = BackendClass.from_file(str(folder / "tokenizer.json"))
        _add_tokens(backend, config, [*special.values(), *_more_special(special_map), *_more_special(config)])
        probe(backend)
    ends = _stated_ends(files)
    if "eos_token" in special and (number := backend.token_to_id(special["eos_token"])) is not None:
        ends.add(number)
    return Tokenizer(
        backend,
        special_tokens=special,
        eos_token_ids=frozenset(ends | _end_ids(backend)),
        chat_templates=_folder_templates(folder, config),
    )


def _add_tokens(backend: Backend, config: Mapping[str, Any], special: Sequence[str]) -> None:
    """Tokens that the configuration adds to the vocabulary, and those of it that it calls special: as transformers
    reads them, they are matched whole in a text and left out of what is shown."""
    from tokenizers import AddedToken

    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    stated = config.get("added_tokens_decoder")
    for info in stated.values() if isinstance(stated, dict) else ():
        text = _content(info) if isinstance(info, dict) else None
        if text is not None and text not in there:
            flags = {key: bool(info.get(key)) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            backend.add_tokens([AddedToken(text, **flags)])
            there.add(text)
    for text in special:
        if text not in there and backend.token_to_id(text) is not None:
            backend.add_special_tokens([AddedToken(text, normalized=False, special=True)])
            there.add(text)


def _stated_ends(files: ModelFiles) -> set[int]:
    """``eos_token_id``, one or several: the generation's before the model's, and before that of its text half."""
    config = files.config or {}
    text = config.get("text_config")
    inner = text.get("eos_token_id") if isinstance(text, dict) else None
    stated = (files.generation_config or {}).get("eos_token_id", config.get("eos_token_id", inner))
    return {number for number in (stated if isinstance(stated, list) else [stated]) if isinstance(number, int)}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token`` and so on, whether written as text or as an object with a content."""
    found = {f"{role}_token": _content(config.get(f"{role}_token")) for role in _ROLES}
    return {role: text for role, text in found.items() if text is not None}


def _more_special(config: Mapping[str, Any]) -> list[str]:
    """The special tokens without a role, under the name of transformers 4 or 5."""
    lists = [config.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    texts = [_content(value) for values in lists if isinstance(values, list) for value in values]
    return [text for text in texts if text is not None]


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _folder_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """chat_template.jinja and additional_chat_templates/NAME.jinja, else chat_template.json, else
    tokenizer_config.json's: one text, or several by name."""
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = {**{file.stem: file for file in more}, "default": folder / "chat_template.jinja"}
    texts = {name: file.read_text("utf-8", "replace") for name, file in files.items() if _is_template(file)}
    if "default" in texts:
        return texts
    stated = (read_json(folder / "chat_template.json") or {}).get("chat_template", config.get("chat_template"))
    if isinstance(stated, str):
        return {"default": stated}
    entries = stated if isinstance(stated, list) else []
    return {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }


def _is_template(file: Path) -> bool:
    return file.is_file() and file.stat().st_size <= _MAX_TEMPLATE_BYTES


def _end_ids(backend: Backend) -> set[int]:
    added = backend.get_added_tokens_decoder()
    return {number for number, token in added.items() if token.special and token.content in _END_TEXTS}
