"""Mistakes in settings as sentences that name the field."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator

from scaling.common.json_text import dump_json
from scaling.common.validation import explain_errors, list_mistakes


class Inner(BaseModel):
    """A table within the settings."""

    model_config = ConfigDict(extra="forbid")
    share: float = Field(0.5, gt=0, lt=1)


class Settings(BaseModel):
    """Settings of many types."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    rate: float = 1.0
    steps: PositiveInt = 1
    fast: bool = False
    kind: Literal["one", "two"] = "one"
    source: str | dict[str, str] = "x"
    sizes: tuple[PositiveInt, ...] = Field((1,), min_length=1)
    inner: Inner = Inner()

    @model_validator(mode="after")
    def _check(self) -> Settings:
        if self.steps == 13:
            raise ValueError("steps: needed another number\nrate: needed another one, too")
        return self


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rate": "fast"}, "rate: needed a number, got 'fast'"),
        ({"rate": math.inf}, "rate: needed a finite number, got inf"),
        ({"rate": math.nan}, "rate: needed a finite number, got nan"),
        ({"steps": 0}, "steps: needed a number greater than 0, got 0"),
        ({"steps": 1.5}, "steps: needed a whole number, got 1.5"),
        ({"fast": "perhaps"}, "fast: needed true or false, got 'perhaps'"),
        ({"kind": "tow"}, "kind: needed 'one' or 'two', got 'tow'; did you mean two?"),
        ({"source": 3}, "source: needed text or a table, got 3"),
        ({"sizes": []}, "sizes: needed at least 1 values, got []"),
        ({"sizes": [-1]}, "sizes.0: needed a number greater than 0, got -1"),
        ({"inner": {"share": 1}}, "inner.share: needed a number less than 1, got 1"),
        ({"inner": {"shair": 0.1}}, "inner.shair: unknown key; did you mean share?"),
        ({"inner": 3}, "inner: needed a table, got 3"),
        ({"rates": 1}, "rates: unknown key; did you mean rate?"),
        ({"speed": 1}, "speed: unknown key; did you mean rate?"),
        ({"zzz": 1}, "zzz: unknown key; known keys: fast, inner, kind, rate, sizes, source, steps"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_its_field(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(settings)
    assert explain_errors(caught.value, Settings, synonyms={"speed": "rate"}) == [expected]


def test_all_mistakes_are_listed_and_those_of_several_fields_are_sentences_of_their_own() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"rate": "x", "steps": -1, "no": 1})
    assert [line.split(":")[0] for line in explain_errors(caught.value, Settings)] == ["rate", "steps", "no"]
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate({"steps": 13})
    lines = explain_errors(caught.value, Settings)
    assert lines == ["steps: needed another number", "rate: needed another one, too"]
    assert list_mistakes(lines) == "2 mistakes\n  steps: needed another number\n  rate: needed another one, too"
    assert list_mistakes(lines[:1]) == "steps: needed another number"


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    value = {"loss": math.nan, "list": [1.5, -math.inf, (math.nan, 2)], "text": "NaN", "deep": {"x": math.inf}}
    text = dump_json(value)
    assert "NaN," not in text
    expected = {"loss": None, "list": [1.5, None, [None, 2]], "text": "NaN", "deep": {"x": None}}
    assert json.loads(text, parse_constant=pytest.fail) == expected
