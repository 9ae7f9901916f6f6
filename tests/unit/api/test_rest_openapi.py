"""The OpenAPI document is accepted by tools and describes exactly what is served."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator
from pydantic import TypeAdapter
from rest_harness import DOCUMENT, check_schema, serving

from xferd.api import types as t
from xferd.api.errors import ERRORS_BY_CODE, PoolExhausted, XferdError
from xferd.api.rest import _bodies as bodies
from xferd.api.rest._problems import problem
from xferd.api.rest._shapes import shape_of
from xferd.api.rest._table import ROUTES


def test_the_document_is_valid() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


async def test_the_document_is_served_and_has_exactly_the_routes_of_the_server() -> None:
    async with serving() as rest:
        served = (await rest("GET", "/openapi.json")).json
        router = rest.face._app.router  # what is really routed, not what the table says
        routed = {(route.method, route.resource.canonical) for route in router.routes() if route.resource}
    assert served == json.loads(json.dumps(DOCUMENT))
    described = {(method.upper(), path) for path, item in served["paths"].items() for method in item}
    assert described == routed
    assert len(described) == len(ROUTES)


def test_every_operation_has_a_name_a_summary_and_typed_failures() -> None:
    names = [route.name for route in ROUTES]
    assert len(set(names)) == len(names)
    for route in ROUTES:
        assert re.fullmatch(r"[A-Z].*\.", route.summary), route.name
        operation = DOCUMENT["paths"][route.path][route.method.lower()]
        assert "default" in operation["responses"]


def test_every_reference_has_its_component() -> None:
    text = json.dumps(DOCUMENT)
    wanted = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert wanted <= set(DOCUMENT["components"]["schemas"])


@pytest.mark.parametrize("cls", sorted(ERRORS_BY_CODE.values(), key=lambda cls: cls.code))
def test_every_error_is_a_valid_problem(cls: type[XferdError]) -> None:
    response = problem(cls("m", limit="l", remedy="r", routes_tried=("x: y",)))
    check_schema({"$ref": "#/components/schemas/Problem"}, json.loads(response.body))
    assert 400 <= response.status < 600


ANSWERED = [
    cls
    for _, cls in inspect.getmembers(t, dataclasses.is_dataclass)
    if cls.__name__ in DOCUMENT["components"]["schemas"]
]


def sample(hint: Any) -> Any:
    """Make some value of a type of the contract, with numbers that JavaScript would round."""
    if hint is XferdError:
        return PoolExhausted("m")
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        hints = inspect.get_annotations(hint, eval_str=True, locals={"XferdError": XferdError, "ListSpec": object})
        return hint(**{field.name: sample(hints[field.name]) for field in dataclasses.fields(hint)})
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return list(hint)[-1]
    plain = getattr(hint, "__supertype__", hint)
    if plain in (int, str, float, bool, bytes):
        return {int: (1 << 63) + 1, str: "s", float: 0.5, bool: True, bytes: b"\0"}[plain]
    arguments = hint.__args__
    return (sample(arguments[0]),) if Ellipsis in arguments else sample(arguments[0])


@pytest.mark.parametrize("cls", ANSWERED, ids=lambda cls: cls.__name__)
def test_every_answer_fits_its_schema(cls: type) -> None:
    assert len(ANSWERED) >= 15
    encoded = shape_of(cls).encode(sample(cls))
    check_schema(dict(shape_of(cls).schema), json.loads(json.dumps(encoded)))
    for name in ("epoch", "handle"):
        assert isinstance(encoded.get(name, ""), str)


def test_a_type_without_a_form_is_refused_rather_than_guessed() -> None:
    with pytest.raises(TypeError, match="JSON"):
        shape_of(dict[str, int])


U64 = st.integers(0, (1 << 64) - 1)
COLUMNS = TypeAdapter(bodies.ColumnsBody)


@given(st.lists(U64, min_size=1), st.data())
def test_columns_come_through_exactly(values: list[int], data: st.DataObject) -> None:
    """Any u64, as an integer or as a decimal string, arrives as itself."""
    given_as = [str(value) if data.draw(st.booleans()) else value for value in values]
    body = COLUMNS.validate_json(json.dumps({"region": 0, "offset": given_as, "nbytes": 1}))
    assert body.offset.dtype == np.uint64
    assert body.offset.tolist() == values


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
)


@given(ANYTHING)
def test_rubbish_never_gets_through_as_numbers(value: Any) -> None:
    try:
        body = COLUMNS.validate_json(json.dumps({"region": value, "offset": [0], "nbytes": 1}))
    except (ValueError, XferdError):
        return
    rows = value if isinstance(value, list) else [value]
    assert all(type(row) in (int, str) and 0 <= int(row) < 1 << 64 for row in rows)
    assert body.region.tolist() == [int(row) for row in rows]
