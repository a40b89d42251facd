# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests that the example server understands, and those that it does not."""

import pytest

from moe_serve.completions import BadField, parse


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "body is []; allowed: a JSON object"),
        ({}, "prompt is None; allowed: a string, or a list of bytes"),
        ({"prompt": ""}, "prompt is ''"),
        ({"prompt": [1, 256]}, "prompt is [1, 256]"),
        ({"prompt": "\ud800"}, "without lone surrogates"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0; allowed: an integer from 1"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens is True"),
        ({"prompt": "a", "max_tokens": 2.5}, "max_tokens is 2.5"),
        ({"prompt": "a", "temperature": -1}, "temperature is -1; allowed: a number from 0"),
        ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
        ({"prompt": "a", "top_p": 0}, "top_p is 0"),
        ({"prompt": "a", "top_k": 257}, "top_k is 257; allowed: an integer from 0 to 256"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "stop": [""]}, "stop is ['']"),
        ({"prompt": "a", "stop": ["a"] * 5}, "up to 4"),
        ({"prompt": "a", "stream": 1}, "stream is 1; allowed: true or false"),
        ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options is {'x': 1}"),
        ({"prompt": "a", "logprobs": 5}, "logprobs is 5"),
        ({"prompt": "a", "n": 2}, "n is 2; allowed: 1"),
        ({"prompt": "a", "model": "other"}, "model is 'other'; allowed: 'tiny'"),
        ({"prompt": "a", "heat": 1}, "heat is 1; allowed: fields that"),
    ],
)
def test_a_bad_field_is_named(body, message):
    with pytest.raises(BadField) as caught:
        parse(body, model="tiny")
    assert message in str(caught.value)


def test_what_changes_nothing_is_taken():
    neutral = {"n": 1, "best_of": 1, "echo": False, "logit_bias": {}, "user": "me"}
    asked = parse(
        {"prompt": [0, 255], "max_tokens": 3, "stop": "é", "seed": 5, **neutral}, model=""
    )
    request = asked.request
    assert (request.prompt, request.max_tokens, request.seed) == (b"\x00\xff", 3, 5)
    assert (request.stop, request.temperature, request.top_k) == (("é".encode(),), 1.0, 0)
    assert (asked.stream, asked.logprobs, asked.with_usage) == (False, False, True)
