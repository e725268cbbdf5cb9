"""How a request wants its tokens chosen, and its checks. Names follow vLLM and OpenAI."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from foretell.core.structured import StructuredOutput
from foretell.errors import InvalidRequestError

MAX_N = 128
MAX_LOGPROBS = 128
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
Pooling = Literal["mean", "last"]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping of one request. ``temperature=0`` is greedy; ``max_tokens=None`` means to the
    end of the context. ``min_p`` (Nguyen et al. 2024) keeps tokens with p ≥ min_p · max p; ``top_p`` the
    smallest set with mass ≥ top_p; ``top_k`` the k likeliest (0: all). The penalties are OpenAI's
    (presence, frequency over output tokens) and CTRL's (repetition over prompt and output). ``structured`` says
    what form the output must have; ``pooling`` asks for an embedding of the prompt in place of an output.

    Raises InvalidRequestError, naming the parameter, for a value outside its range.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    bad_token_ids: Sequence[Sequence[int]] = ()  # bad_words as token ids; the API layer fills it in
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    detokenize: bool = True
    eos_token_ids: Sequence[int] = ()  # the model's; the API layer fills it in
    structured: StructuredOutput | None = None
    pooling: Pooling | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "bad_words"):
            if isinstance(getattr(self, name), str):
                object.__setattr__(self, name, (getattr(self, name),))
        for name in ("stop", "bad_words", "stop_token_ids", "bad_token_ids", "eos_token_ids"):
            if getattr(self, name) is None:  # as other clients spell "none of these"
                object.__setattr__(self, name, ())
        if self.logit_bias is None:
            object.__setattr__(self, "logit_bias", {})
        self._check_kinds()
        self._check_numbers()
        self._check_lists()
        self._check_forms()

    def _check_kinds(self) -> None:
        for name in _FLAGS:
            value = getattr(self, name)
            if value is not True and value is not False:
                raise InvalidRequestError(f"{name} is True or False, got {value!r}")
        for name in _LISTS:
            value = getattr(self, name)
            if value.__class__ is tuple or value.__class__ is list:
                continue
            if value is None and name == "allowed_token_ids":
                continue
            if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
                raise InvalidRequestError(f"{name} must be a list, got {type(value).__name__}")
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequestError(f"logit_bias maps token ids to numbers, got {type(self.logit_bias).__name__}")

    def _check_numbers(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if not _is_finite(value):
                raise InvalidRequestError(f"{name} must be a finite number, got {value!r}")
            if not low <= value <= high:
                raise InvalidRequestError(f"{name} must be between {low:g} and {high:g}, got {value!r}")
        if self.top_p <= 0:
            raise InvalidRequestError(f"top_p must be above 0, got {self.top_p!r}; 1 keeps every token")
        for name, low_int, high_int in _INT_RANGES:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL_INTS:
                continue
            if not _is_int(value):
                raise InvalidRequestError(f"{name} must be a whole number, got {value!r}")
            if not low_int <= value <= high_int:
                raise InvalidRequestError(f"{name} must be between {low_int} and {high_int}, got {value!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(f"min_tokens ({self.min_tokens}) is larger than max_tokens ({self.max_tokens})")

    def _check_lists(self) -> None:
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings are found in text: leave detokenize on, or use stop_token_ids")
        if len(self.stop) > MAX_STOPS:
            raise InvalidRequestError(f"at most {MAX_STOPS} stop strings, got {len(self.stop)}")
        for text in (*self.stop, *self.bad_words):
            if not isinstance(text, str) or text == "":
                raise InvalidRequestError(f"stop and bad_words need non-empty strings, got {text!r}")
            if len(text) > MAX_STOP_CHARS:
                raise InvalidRequestError(f"a stop string or bad word is longer than {MAX_STOP_CHARS} characters")
        for token_id, bias in self.logit_bias.items():
            if not (_is_int(token_id) and token_id >= 0):
                raise InvalidRequestError(f"logit_bias needs token ids ≥ 0, got {token_id!r}")
            if not (_is_finite(bias) and abs(bias) <= 100):
                raise InvalidRequestError(f"logit_bias values lie in [-100, 100], got {bias!r}")
        if self.allowed_token_ids is not None and not len(self.allowed_token_ids):
            raise InvalidRequestError("allowed_token_ids is empty: no token could be sampled")
        for word in self.bad_token_ids:
            if not isinstance(word, Sequence) or not len(word):
                raise InvalidRequestError("bad_token_ids is a list of words, each a list of at least one token id")
        for token_id in (
            *self.stop_token_ids,
            *(i for word in self.bad_token_ids for i in word),
            *(self.allowed_token_ids or ()),
        ):
            if not (_is_int(token_id) and token_id >= 0):
                raise InvalidRequestError(f"token ids are whole numbers ≥ 0, got {token_id!r}")

    def _check_forms(self) -> None:
        if self.structured is not None and not isinstance(self.structured, StructuredOutput):
            raise InvalidRequestError(f"structured must be a StructuredOutput, got {type(self.structured).__name__}")
        if self.pooling is None:
            return
        kinds = get_args(Pooling)
        if self.pooling not in kinds:
            raise InvalidRequestError(f"pooling must be one of {', '.join(kinds)}, got {self.pooling!r}")
        asked = [name for name in ("structured", "logprobs", "prompt_logprobs") if getattr(self, name) is not None]
        if asked or self.n != 1:
            raise InvalidRequestError(f"pooling gives an embedding alone: leave out {', '.join(asked) or 'n'}")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end the output: the request's own, and the model's unless ``ignore_eos``."""
        own = frozenset(self.stop_token_ids)
        return own if self.ignore_eos else own | frozenset(self.eos_token_ids)

    @property
    def is_plain_greedy(self) -> bool:
        """Argmax of the raw logits: nothing has to be counted, masked or drawn."""
        return self.temperature == 0 and not self.reshapes_logits

    @property
    def reshapes_logits(self) -> bool:
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.allowed_token_ids is not None
            or self.bad_token_ids
            or self.min_tokens
            or self.structured is not None
        )

    @property
    def waits_for_its_tokens(self) -> bool:
        """Choosing a token needs, on the CPU, the values of those before it, or its logits: the next step of such a
        request cannot be computed ahead."""
        return (
            self.reshapes_logits
            or self.logprobs is not None
            or self.prompt_logprobs is not None
            or self.pooling is not None
        )

    @property
    def reads_every_position(self) -> bool:
        """The whole prompt has to be computed: nothing of it may be taken from the prefix cache."""
        return self.prompt_logprobs is not None or self.pooling is not None


_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.01, 100.0),  # what is smaller makes infinities of logits
)
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")
_LISTS = ("stop", "bad_words", "bad_token_ids", "stop_token_ids", "allowed_token_ids", "eos_token_ids")
_BIG = 2**31 - 1
_INT_RANGES = (
    ("n", 1, MAX_N),
    ("top_k", -1, _BIG),
    ("seed", -(2**63), 2**64 - 1),
    ("min_tokens", 0, _BIG),
    ("max_tokens", 1, _BIG),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)
_OPTIONAL_INTS = {"seed", "max_tokens", "logprobs", "prompt_logprobs"}
PARAM_NAMES = tuple(f.name for f in fields(SamplingParams))
