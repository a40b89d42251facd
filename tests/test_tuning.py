# SPDX-License-Identifier: Apache-2.0
"""Tables of tuning: where they are kept, and which launches a group finds in them."""

import dataclasses
import json
import logging

import pytest

import jax_ep
from ep_launch.processes import run_processes
from ep_testing.programs import make_mesh
from ep_testing.tuning_tables import CONFIG, DEVICE, GRID, FakeMeasure, entry, key, table
from jax_ep._src.tuner.search import search
from jax_ep._src.tuning import files
from jax_ep._src.tuning.lookup import check, resolve
from jax_ep._src.tuning.table import UnknownFormatError, from_json, to_json

# --- tables and files ----------------------------------------------------------------------------


def test_a_table_survives_the_way_to_a_file_and_back(tmp_path):
    whole = table(search(key(op="dispatch"), GRID, FakeMeasure()), entry())
    path = tmp_path / "sub" / "t.json"
    assert files.merge_into(path, whole) == whole
    assert files.read(path) == whole
    text = json.loads(path.read_text())
    assert (text["format"], text["protocol"], text["device"]) == (1, 1, DEVICE)
    assert text["entries"][0]["use"] == {"num_sms": 48, "senders": 4, "tail": True}
    assert from_json(to_json(whole)) == whole


def test_new_entries_join_those_of_a_file_and_replace_their_own(tmp_path):
    path = tmp_path / "t.json"
    files.merge_into(path, table(entry(us=10, tokens=1), entry(us=20, tokens=2)))
    both = files.merge_into(path, table(entry(us=15, tokens=2), entry(us=30, tokens=4)))
    assert {e.key.tokens: e.us for e in both.entries} == {1: 10, 2: 15, 4: 30}
    assert files.read(path) == both
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.json", "t.json.lock"]


BAD = {
    "nothing": "",
    "half": to_json(table(entry()))[:200],
    "no object": "[1, 2]",
    "no entries": '{"format": 1, "protocol": 1, "device": "x"}',
    "bytes": b"\xff\xfe",
    "other op": to_json(table(entry())).replace('"combine"', '"gather"'),
    "SMs of 0": to_json(table(entry())).replace('"num_sms": 16', '"num_sms": 0'),
    "senders of 0": to_json(table(entry())).replace('"num_sms": 16', '"senders": 0'),
    "a list in a key": to_json(table(entry())).replace('"layout": "expert"', '"layout": []'),
    "other format": to_json(table(entry())).replace('"format": 1', '"format": 2'),
    "other protocol": to_json(table(entry())).replace('"protocol": 1', '"protocol": 0'),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_ignored_once_and_moved_aside_by_who_writes(name, tmp_path, caplog):
    path = tmp_path / f"{name}.json"
    bad = BAD[name]
    path.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    with pytest.raises(ValueError, match=r"no table of tuning|tune again") as caught:
        files.read(path)
    assert str(path) in str(caught.value)
    is_of_others = name in ("other format", "other protocol")
    assert isinstance(caught.value, UnknownFormatError) == is_of_others
    for _ in range(2):
        assert files.try_read(path) is None
    warnings = [r for r in caplog.records if "ignoring a table" in r.getMessage()]
    assert len(warnings) == 1
    files.merge_into(path, table(entry()))
    assert files.read(path) == table(entry())
    assert path.with_name(path.name + ".old").exists()


def test_two_writers_at_once_lose_nothing(tmp_path):
    run_processes(
        f"""
import pathlib, sys
from jax_ep._src.tuning import files
from jax_ep._src.tuning.table import from_json, to_json, Table
import dataclasses
path = pathlib.Path({str(tmp_path / "t.json")!r})
one = from_json({to_json(table(entry()))!r})
for i in range(40):
    key = dataclasses.replace(one.entries[0].key, tokens=2 ** (2 * (i % 10) + process), topk=i + 1)
    entry = dataclasses.replace(one.entries[0], key=key)
    found = files.merge_into(path, dataclasses.replace(one, entries=(entry,)))
    assert entry in found.entries
""",
        num_processes=2,
        devices_each=1,
    )
    assert len(files.read(tmp_path / "t.json").entries) == 80


def test_a_table_of_another_device_is_moved_aside(tmp_path):
    path = tmp_path / "t.json"
    files.merge_into(path, table(entry(), device="other"))
    assert files.merge_into(path, table(entry())).device == DEVICE
    assert files.read(path.with_name("t.json.old")).device == "other"


# --- lookup --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_other_tables(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_EP_TUNING", raising=False)
    monkeypatch.setenv("JAX_EP_CACHE_DIR", str(tmp_path / "cache"))


def _launches(resolved):
    return {(x.op, x.path, x.num_tokens): x for x in resolved.tuning.launches}


def test_a_call_takes_its_entry_or_the_nearest_within_a_factor_of_4(tmp_path):
    path = tmp_path / "t.json"
    entries = (entry(tokens=1, num_sms=8), entry(tokens=64, num_sms=64))
    files.merge_into(path, table(*entries))
    found = _launches(resolve(str(path), CONFIG, 2, DEVICE))
    by_tokens = {tokens: x.num_sms for (_, _, tokens), x in found.items()}
    assert by_tokens == {1: 8, 2: 8, 4: 8, 16: 64, 32: 64, 64: 64, 128: 64, 256: 64}
    assert {(op, path) for op, path, _ in found} == {("combine", "high_throughput")}


@pytest.mark.parametrize(
    "change",
    [
        {"hidden": 65}, {"topk": 3}, {"experts": 32}, {"ranks": 4}, {"dtype": "float32"},
        {"layout": "rank"}, {"nodes": 2}, {"wire": "float8_e4m3fn"}, {"recv": "float8_e4m3fn"},
    ],
)  # fmt: skip
def test_other_sizes_say_nothing(change, tmp_path):
    path = tmp_path / "t.json"
    files.merge_into(path, table(entry(**change)))
    assert resolve(str(path), CONFIG, 2, DEVICE).tuning == jax_ep.Tuning()


def test_another_device_says_nothing(tmp_path):
    path = tmp_path / "t.json"
    files.merge_into(path, table(entry(), device="other"))
    assert resolve(str(path), CONFIG, 2, DEVICE).tuning == jax_ep.Tuning()


def test_the_first_place_with_an_entry_counts(tmp_path, monkeypatch):
    named, asked = tmp_path / "named.json", tmp_path / "asked.json"
    files.merge_into(files.cache_path(DEVICE), table(entry(num_sms=1), entry(tokens=512)))
    assert (
        _launches(resolve(None, CONFIG, 2, DEVICE))["combine", "high_throughput", 64].num_sms == 1
    )
    files.merge_into(named, table(entry(num_sms=2)))
    monkeypatch.setenv("JAX_EP_TUNING", str(named))
    assert (
        _launches(resolve(None, CONFIG, 2, DEVICE))["combine", "high_throughput", 64].num_sms == 2
    )
    files.merge_into(asked, table(entry(num_sms=3)))
    found = _launches(resolve(asked, CONFIG, 2, DEVICE))
    assert found["combine", "high_throughput", 64].num_sms == 3
    assert found["combine", "high_throughput", 64].source == str(asked)
    assert found["combine", "high_throughput", 512].source == str(files.cache_path(DEVICE))
    assert resolve("off", CONFIG, 2, DEVICE).tuning == jax_ep.Tuning()


def test_where_files_are(monkeypatch, tmp_path):
    assert files.file_name("NVIDIA H200") == "nvidia_h200.json"
    assert files.cache_path("NVIDIA H200") == tmp_path / "cache" / "tuning" / "nvidia_h200.json"
    monkeypatch.delenv("JAX_EP_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_path("x") == tmp_path / "jax_ep" / "tuning" / "x.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_path("x") == tmp_path / ".cache" / "jax_ep" / "tuning" / "x.json"


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # tokens: (high throughput, low latency), of each operation
        ({1: (10, 5), 2: (10, 5), 4: (10, 12)}, 2),
        ({1: (10, 5), 2: (10, 5)}, 2),
        ({1: (10, 12), 2: (10, 5)}, 0),
        ({16: (10, 5), 256: (10, 5)}, 256),
        ({}, None),
    ],
)
def test_up_to_how_many_tokens_low_latency_kernels_serve(times, expected, tmp_path):
    path = tmp_path / "t.json"
    entries = [
        entry(op=op, path=of_path, tokens=tokens, us=us)
        for tokens, both in times.items()
        for of_path, us in zip(("high_throughput", "low_latency"), both, strict=True)
        for op in ("dispatch", "combine")
    ]
    files.merge_into(path, table(*entries))
    assert resolve(path, CONFIG, 2, DEVICE).tuning.low_latency_tokens == expected
    asked = dataclasses.replace(CONFIG, low_latency_tokens=0)
    assert resolve(path, asked, 2, DEVICE).tuning.low_latency_tokens is None


def test_require_names_what_is_missing():
    all_tokens = [2**i for i in range(10)]
    ops = ("dispatch", "combine")
    present = [
        entry(op=op, tokens=t) for op in ops for t in all_tokens if (op, t) < ("dispatch", 9)
    ]
    files.merge_into(files.cache_path(DEVICE), table(*present))
    found = resolve("require", CONFIG, 2, DEVICE)
    assert "(op dispatch, path high_throughput, ranks 2, nodes 1, tokens 64," in found.missing
    assert "and 3 more; `python -m jax_ep tune`" in found.missing
    files.merge_into(
        files.cache_path(DEVICE), table(*(entry(op="dispatch", tokens=t) for t in all_tokens))
    )
    assert resolve("require", CONFIG, 2, DEVICE).missing is None


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"tuning is a int; allowed: None, 'off', 'require', the"):
        check(3)
    with pytest.raises(
        ValueError, match=r"tuning is '.*none.json', which cannot be read .*; allowed"
    ):
        check(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad.json: no table of tuning"):
        check(tmp_path / "bad.json")
    for good in (None, "off", "require", jax_ep.Tuning()):
        check(good)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"op": "gather"}, "TunedLaunch.op is 'gather'; allowed: 'dispatch', 'combine'"),
        ({"path": "x"}, "TunedLaunch.path is 'x'; allowed: 'high_throughput', 'low_latency'"),
        ({"num_tokens": 3}, "TunedLaunch.num_tokens is 3; allowed: a power of two"),
        ({"num_tokens": 0}, "TunedLaunch.num_tokens is 0; allowed: a power of two"),
        ({"num_sms": 0}, "TunedLaunch.num_sms is 0; allowed: None or an int from 1"),
        ({"num_senders": -1}, "TunedLaunch.num_senders is -1; allowed: None or an int from 1"),
        ({"tail": 2}, "TunedLaunch.tail is 2; allowed: None, True, False"),
        ({"op": "combine", "tail": True}, "TunedLaunch.tail is True; allowed: None, for a combine"),
        (
            {"path": "low_latency", "num_senders": 2},
            "TunedLaunch.num_senders is 2; allowed: None, for a dispatch of path 'low_latency'",
        ),
    ],
)
def test_a_bad_launch_is_named(fields, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared
        jax_ep.TunedLaunch(**{"op": "dispatch", "num_tokens": 4} | fields)
    assert str(caught.value).startswith(message)


def test_a_bad_tuning_is_named():
    launch = jax_ep.TunedLaunch(op="combine", num_tokens=4)
    for fields, message in (
        ({"launches": (launch, launch)}, "Tuning.launches has 2 for .*; allowed: 1"),
        ({"launches": (3,)}, "Tuning.launches has a int; allowed: TunedLaunch"),
        ({"low_latency_tokens": 257}, "Tuning.low_latency_tokens is 257; allowed: None or an int"),
    ):
        with pytest.raises(ValueError, match=message):
            jax_ep.Tuning(**fields)
    assert hash(jax_ep.Tuning(launches=(launch,))) == hash(jax_ep.Tuning(launches=(launch,)))


# --- groups --------------------------------------------------------------------------------------


def test_a_group_on_cpu_takes_the_argument_and_tunes_nothing(caplog):
    mesh = make_mesh((2,), ("expert",))
    with (
        caplog.at_level(logging.INFO),
        jax_ep.EpGroup(mesh, "expert", CONFIG, tuning="require") as g,
    ):
        assert g.tuning == jax_ep.Tuning()
    assert not any("tuned" in record.getMessage() for record in caplog.records)
    with pytest.raises(ValueError, match="tuning is a int; allowed"):
        jax_ep.EpGroup(mesh, "expert", CONFIG, tuning=3)
