# SPDX-License-Identifier: Apache-2.0
"""Bodies of `POST /v1/completions`: what may be asked for, and how the answer looks.

The fields are those of OpenAI's completions, as far as they mean something here. A field that is
not known is an error, so that nobody believes it to have an effect.
"""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

from moe_serve.plans import Request
from moe_serve.streams import Token

_MAX_STOPS = 4
# What clients send along and what changes nothing, with the values that say so.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": (None,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": (None, {}),
}


class BadField(ValueError):
    """A field has a value that is not allowed.

    Attributes:
        field: which.
    """

    def __init__(self, field: str, value: Any, allowed: str) -> None:
        super().__init__(f"{field} is {value!r}; allowed: {allowed}")
        self.field = field


@dataclasses.dataclass(frozen=True)
class Asked:
    """A body that was understood."""

    request: Request
    stream: bool
    logprobs: bool
    with_usage: bool


def parse(body: Any, *, model: str) -> Asked:
    """Reads the body of a request.

    Raises:
        BadField: something is not allowed.
    """
    if not isinstance(body, dict):
        raise BadField("body", body, "a JSON object")
    fields = dict(body)
    if (name := fields.pop("model", model)) != model:
        raise BadField("model", name, repr(model))
    fields.pop("user", None)
    for field, neutral in _NEUTRAL.items():
        if (value := fields.pop(field, neutral[0])) not in neutral:
            raise BadField(field, value, " or ".join(map(repr, neutral)))
    stream = _boolean(fields, "stream")
    options = fields.pop("stream_options", None) or {}
    if not isinstance(options, dict) or options.keys() - {"include_usage"}:
        raise BadField("stream_options", options, "an object with include_usage")
    logprobs = fields.pop("logprobs", None)
    if logprobs not in (None, False, True, 0, 1):
        raise BadField("logprobs", logprobs, "null, 0 or 1: of the bytes that were chosen")
    request = Request(
        id=0,
        prompt=_prompt(fields.pop("prompt", None)),
        max_tokens=_number(fields, "max_tokens", int, 16, 1, 1 << 20),
        stop=_stop(fields.pop("stop", None)),
        temperature=_number(fields, "temperature", float, 1.0, 0, 100),
        top_k=_number(fields, "top_k", int, 0, 0, 256),
        top_p=_number(fields, "top_p", float, 1.0, 1e-6, 1),
        seed=_number(fields, "seed", int, secrets.randbits(31), 0, (1 << 31) - 1),
    )
    for field, value in fields.items():
        raise BadField(field, value, "fields that the documentation names")
    with_usage = not stream or _boolean(options, "include_usage")
    return Asked(request, stream, logprobs is not None and logprobs is not False, with_usage)


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.pop(name, False)
    if not isinstance(value, bool):
        raise BadField(name, value, "true or false")
    return value


def _number(
    fields: dict[str, Any], name: str, kind: type, default: float, least: float, most: float
) -> Any:
    value = fields.pop(name, None)
    if value is None:
        return default
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # NaN is not
        what = "an integer" if kind is int else "a number"
        raise BadField(name, value, f"{what} from {least} to {most}")
    return kind(value)


def _prompt(value: Any) -> bytes:
    if isinstance(value, str) and value:
        return _utf8("prompt", value)
    is_bytes = isinstance(value, list) and all(type(v) is int and 0 <= v < 256 for v in value)
    if is_bytes and value:
        return bytes(value)
    raise BadField("prompt", value, "a string, or a list of bytes from 0 to 255, not empty")


def _stop(value: Any) -> tuple[bytes, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > _MAX_STOPS
        or not all(isinstance(stop, str) and stop for stop in stops)
    ):
        raise BadField("stop", value, f"a string, or up to {_MAX_STOPS}, none of them empty")
    return tuple(_utf8("stop", stop) for stop in stops)


def _utf8(field: str, value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:  # JSON can have halves of characters
        raise BadField(field, value, "text without lone surrogates") from None


class Answer:
    """How the parts of an answer look."""

    def __init__(self, asked: Asked, request_id: str, model: str) -> None:
        self._asked = asked
        self._head = {
            "id": request_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def part(self, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """Text and the bytes that have come: all of them, or the next of a stream."""
        finish = tokens[-1].finish if tokens else None
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        if self._asked.logprobs:
            choice["logprobs"] = {
                "tokens": [_name(token.byte) for token in tokens],
                "token_logprobs": [token.logprob for token in tokens],
            }
        return {**self._head, "choices": [choice]}

    def usage(self, num_written: int) -> dict[str, Any]:
        """The numbers of bytes."""
        read = len(self._asked.request.prompt)
        return {
            "prompt_tokens": read,
            "completion_tokens": num_written,
            "total_tokens": read + num_written,
        }


def _name(byte: int) -> str:
    return chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}"
