"""What pydantic finds wrong with a value, as a sentence in our words."""

from __future__ import annotations

from pydantic import ValidationError

_EXPECTED = {
    "greater_than": "a number above {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "a number of at most {le}",
    "literal_error": "one of {expected}",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "list_type": "a list",
    **dict.fromkeys(("int_parsing", "int_type", "int_from_float"), "a whole number"),
    "int_parsing_size": "a whole number of fewer digits",
    **dict.fromkeys(("float_parsing", "float_type"), "a number"),
    "finite_number": "a number that is finite",
    **dict.fromkeys(("bool_parsing", "bool_type"), "true or false"),
}


def sentence_of(name: str, error: ValidationError) -> str:
    """The sentence about the value of one option."""
    found = [entry for entry in error.errors() if entry["loc"][0] == name]
    # Of a union, pydantic tells every member's error; the last member is the widest.
    entry = found[-1]
    if entry["type"] in _EXPECTED:
        context = {key: _plain(value) for key, value in entry.get("ctx", {}).items()}
        expected = f"expected {_EXPECTED[entry['type']].format(**context)}"
    else:
        expected = entry["msg"].removeprefix("Value error, ")
    return f"--{name}: {expected}, found {entry['input']!r:.200}."


def _plain(value: object) -> object:
    """Limits and choices as people write them: 0, not 0.0; no quotation marks."""
    if isinstance(value, float) and value == int(value):
        return int(value)
    return value.replace("'", "") if isinstance(value, str) else value
