"""Plans are data: the same text both ways, and nothing hostile gets through."""

from __future__ import annotations

import functools
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import replfx
from replfx import Plan
from tests.support.models import GPT, ConvNet, tower
from tests.support.snapshots import assert_unchanged, snapshot


@functools.cache
def given_model() -> nn.Module:
    return tower(7)


@functools.cache
def given_plan() -> Plan:
    return replfx.plan(
        given_model(), fusion={"name": "channel", "initial": 0.25}, operator="light", neighbour_gradient=0.5
    )


@functools.cache
def given_text() -> str:
    return given_plan().to_json()


def test_there_and_back() -> None:
    image = torch.randn(2, 3, 8, 8)
    ids = torch.randint(0, 31, (2, 8))
    for model, inputs in ((given_model(), None), (ConvNet(4), image), (GPT(), ids)):
        for options in ({"operator": "light"}, {"operator": "block", "fusion": "scalar_layer"}, {"every": 3}):
            plan = replfx.plan(model, inputs, **options)
            assert Plan.from_json(plan.to_json()).to_json() == plan.to_json()
            assert replfx.plan(model, inputs, **options).to_json() == plan.to_json()
            assert replfx.plan(model, inputs, **options) == plan
            again = replfx.apply(model, Plan.from_json(plan.to_json()))
            assert replfx.report(again).replaced == [r.path for r in plan.replacements]
    assert Plan.from_json(Plan("Tower").to_json()) == Plan("Tower")


def test_it_is_plain_json_with_a_format_and_a_version() -> None:
    document = json.loads(given_text())
    assert (document["format"], document["version"], document["model"]) == ("replfx-plan", 2, "Tower")
    assert [r["path"] for r in document["replacements"]] == ["blocks.1", "blocks.3", "blocks.5"]
    assert document["replacements"][0]["fusion"] == {"name": "channel", "options": {"initial": 0.25}}


def test_a_plan_is_frozen() -> None:
    with pytest.raises(AttributeError):
        given_plan().model = "Other"
    with pytest.raises(AttributeError):
        given_plan().replacements[0].path = "other"


def test_it_outlives_the_process_that_made_it() -> None:
    # What digests and orders depend on may not change from run to run, such as hashes of strings.
    kinds = {r.kind for r in replfx.plan(tower(7)).replacements}
    assert kinds == {replfx.plan(tower(9)).replacements[0].kind} == {given_plan().replacements[0].kind}
    assert len(next(iter(kinds))) == 16


def test_truncated() -> None:
    for cut in range(0, len(given_text().rstrip()), 50):
        with pytest.raises(replfx.PlanError, match="cut short"):
            Plan.from_json(given_text()[:cut])


def changed(change: Callable[[Any], object]) -> str:
    document = json.loads(given_text())
    change(document)
    return json.dumps(document)


def put(*path: str | int, value: object) -> Callable[[Any], object]:
    def change(document: Any) -> None:
        *way, last = path
        for key in way:
            document = document[key]
        document[last] = value

    return change


def drop(*path: str | int) -> Callable[[Any], object]:
    def change(document: Any) -> None:
        *way, last = path
        for key in way:
            document = document[key]
        del document[last]

    return change


def nested(depth: int) -> object:
    tree: object = {"input": "0"}
    for _ in range(depth):
        tree = {"tuple": [tree]}
    return tree


FIRST = ("replacements", 0)


def hostile() -> list[tuple[str, Any, str]]:
    return [
        ("empty", "", "cut short"),
        ("not json", "import os", "cut short"),
        ("list", "[]", "must be a JSON object, not list"),
        ("empty object", "{}", "no field 'format'"),
        ("bytes", given_text().encode(), "JSON text, not bytes"),
        ("pickle", pickle.dumps(given_plan()), "JSON text, not bytes"),
        ("pickle as text", pickle.dumps(given_plan(), 0).decode("latin-1"), "cut short"),
        ("twice", given_text() + given_text(), "cut short|whole JSON"),
        ("other format", changed(put("format", value="onnx")), "its format is 'onnx'"),
        ("version 1", changed(put("version", value=1)), "version 1, this replfx reads version 2"),
        ("version true", changed(put("version", value=True)), "'version' must be int, not bool"),
        ("version text", changed(put("version", value="1")), "'version' must be int, not str"),
        ("no model", changed(drop("model")), "no field 'model'"),
        ("model number", changed(put("model", value=3)), "'model' must be str, not int"),
        ("unknown field", changed(put("exec", value="os.system")), "unknown field 'exec'"),
        ("replacements object", changed(put("replacements", value={})), "'replacements' must be list"),
        ("replacement text", changed(put(*FIRST, value="x")), "replacement 0 must be a JSON object, not str"),
        ("replacement field", changed(put(*FIRST, "more", value=1)), "replacement 0 has an unknown field 'more'"),
        ("no path", changed(drop(*FIRST, "path")), "replacement 0 has no field 'path'"),
        ("path null", changed(put(*FIRST, "path", value=None)), "'path' must be str"),
        ("previous list", changed(put(*FIRST, "previous", value=[])), "'previous' must be str or NoneType, not list"),
        ("gradient text", changed(put(*FIRST, "neighbour_gradient", value="1")), "'neighbour_gradient' must be"),
        ("gradient 7", changed(put(*FIRST, "neighbour_gradient", value=7)), "between 0 and 1, not 7"),
        ("gradient true", changed(put(*FIRST, "neighbour_gradient", value=True)), "not bool"),
        ("fusion text", changed(put(*FIRST, "fusion", value="scalar")), "'fusion' must be dict, not str"),
        ("fusion field", changed(put(*FIRST, "fusion", "module", value="os")), "unknown field 'module'"),
        ("fusion name", changed(put(*FIRST, "fusion", "name", value=1)), "'name' must be str"),
        ("options list", changed(put(*FIRST, "operator", "options", value=[])), "'options' must be dict"),
        ("options rename", changed(put(*FIRST, "fusion", "options", value={"name": "scalar"})), "name"),
        (
            "inputs empty",
            changed(put(*FIRST, "interface", "inputs", value=[])),
            "'inputs' must be a list of slot names",
        ),
        (
            "inputs numbers",
            changed(put(*FIRST, "interface", "inputs", value=[0])),
            "'inputs', item 0 must be str",
        ),
        ("output list", changed(put(*FIRST, "interface", "output", value=[])), "its output holds a list"),
        ("output key", changed(put(*FIRST, "interface", "output", value={"call": "os"})), "its output has 'call'"),
        ("output keys", changed(put(*FIRST, "interface", "output", value={"input": "0", "tuple": []})), "one key"),
        ("deep output", changed(put(*FIRST, "interface", "output", value=nested(40))), "nested deeper than 32"),
        ("deep json", "[" * 100_000 + "]" * 100_000, "whole JSON"),
        ("deep object", '{"a":' * 100_000, "whole JSON"),
        ("nan", given_text().replace("0.25", "NaN"), "the number NaN"),
        ("infinity", given_text().replace("0.25", "-Infinity"), "the number -Infinity"),
        ("huge float", given_text().replace('gradient": 0.5', 'gradient": 1e999'), "gradient|number"),
        ("huge integer", given_text().replace('gradient": 0.5', f'gradient": 1{"0" * 400}'), "gradient|number"),
        ("huge digits", given_text().replace('gradient": 0.5', f'gradient": 1{"0" * 5000}'), "whole JSON"),
        ("duplicate key", given_text().replace('"model"', '"format"', 1), "a field twice: 'format'"),
        (
            "duplicate block",
            changed(lambda d: d["replacements"].append(d["replacements"][0])),
            "replaces a block twice",
        ),
        ("null bytes", "\0" * 64, "whole JSON"),
        ("surrogate", given_text().replace("Tower", "\ud800") + "x", "whole JSON"),
    ]


def test_hostile_files() -> None:
    for name, source, message in hostile():
        with pytest.raises(replfx.PlanError) as caught:
            Plan.from_json(source)
        assert re.search(message, str(caught.value)), name


def test_a_plan_that_is_too_large() -> None:
    with pytest.raises(replfx.PlanError, match="more than any plan needs"):
        Plan.from_json(" " * (64 * 1024 * 1024 + 1))


WELL_FORMED = [
    ("path", put(*FIRST, "path", value="blocks.99"), "no module `blocks.99`"),
    ("empty path", put(*FIRST, "path", value=""), "no module ``"),
    ("private path", put(*FIRST, "path", value="__class__.__init__"), "no module"),
    ("other kind", put(*FIRST, "path", value="stem"), "`stem` of Tower has other parameters"),
    ("no neighbour", put(*FIRST, "previous", value=None), "needs two neighbours"),
    ("neighbour gone", put(*FIRST, "previous", value="nowhere"), "no module `nowhere`"),
    ("neighbour other", put(*FIRST, "next", value="head"), "`head` of Tower has other parameters"),
    ("neighbour replaced", put(*FIRST, "next", value="blocks.3"), "`blocks.3` is replaced in the same plan"),
    ("neighbour itself", put(*FIRST, "next", value="blocks.1"), "is replaced in the same plan"),
    ("inside", put(*FIRST, "path", value="blocks.1.fc1"), "has other parameters"),
    ("kind", put(*FIRST, "kind", value="0" * 16), "has other parameters than the plan's"),
    ("fusion", put(*FIRST, "fusion", "name", value="os.system"), "unknown fusion 'os.system'; there are: channel"),
    ("operator", put(*FIRST, "operator", "name", value="eval"), "unknown operator 'eval'; there are: block"),
    ("fusion option", put(*FIRST, "fusion", "options", value={"x": 1}), "`blocks.1`: fusion 'channel' does not take"),
    ("fusion initial", put(*FIRST, "fusion", "options", value={"initial": "x"}), "`initial` must be a finite number"),
    ("fusion self", put(*FIRST, "fusion", "options", value={"shapes": {}}), "does not take the options"),
    ("no options", put(*FIRST, "operator", "options", value={}), "malformed|options"),
    ("no such map", put(*FIRST, "operator", "options", "maps", value=["x", "y"]), "does not take the options"),
    ("private map", put(*FIRST, "operator", "options", "maps", value=["__class__", "fc2.weight"]), "lack"),
    ("maps number", put(*FIRST, "operator", "options", "maps", value=3), "'maps' must be list, not int"),
    ("maps numbers", put(*FIRST, "operator", "options", "maps", value=[1, 2]), "options|malformed"),
    ("kind of light", put(*FIRST, "operator", "options", "kind", value="magic"), "no kind 'magic'"),
    ("kind list", put(*FIRST, "operator", "options", "kind", value=[]), "kind|malformed"),
    ("rows", put(*FIRST, "operator", "options", "rows", value=[5]), "options|rows|malformed"),
    ("rows beyond", put(*FIRST, "operator", "options", "rows", value=[0, 99]), "has 16 rows"),
    ("rows text", put(*FIRST, "operator", "options", "rows", value="ab"), "options|rows|malformed"),
    ("norm", put(*FIRST, "operator", "options", "norm", value="fc9"), "options"),
    ("norm number", put(*FIRST, "operator", "options", "norm", value=4), "options"),
    ("activation", put(*FIRST, "operator", "options", "activation", value="function:__loader__"), "options"),
    ("activation none", put(*FIRST, "operator", "options", "activation", value="function:nothing"), "options"),
    ("gain", put(*FIRST, "operator", "options", "initial_gain", value="much"), "options"),
    ("option block", put(*FIRST, "operator", "options", "block", value=1), "options"),
]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("change", "message"), [(c, m) for _, c, m in WELL_FORMED], ids=[name for name, _, _ in WELL_FORMED]
)
def test_well_formed_but_hostile(change: Callable[[Any], object], message: str, inplace: bool) -> None:
    model, plan = tower(7), Plan.from_json(changed(change))
    before = snapshot(model)
    with pytest.raises((replfx.PlanError, replfx.FusionError), match=message):
        replfx.apply(model, plan, inplace=inplace)
    assert_unchanged(model, before)


@pytest.mark.parametrize("slot", ["", ".", "-1", "0.", "x y", "__import__('os')", "0.-1"])
def test_slots_that_no_call_can_have(slot: str) -> None:
    with pytest.raises(replfx.PlanError, match="replacement 0, 'interface', 'inputs' must be a list of slot names"):
        Plan.from_json(changed(put(*FIRST, "interface", "inputs", value=[slot])))
    with pytest.raises(replfx.PlanError, match="which is no slot"):
        Plan.from_json(changed(put(*FIRST, "interface", "output", value={"input": slot})))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_edit_gives_a_plan_or_a_plan_error(data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(given_text())))
    stop = data.draw(st.integers(start, min(len(given_text()), start + 30)))
    text = given_text()[:start] + data.draw(st.text(max_size=8)) + given_text()[stop:]
    before = snapshot(given_model())
    try:
        plan = Plan.from_json(text)
        replfx.apply(given_model(), plan)
    except replfx.ReplfxError:
        pass
    assert_unchanged(given_model(), before)
