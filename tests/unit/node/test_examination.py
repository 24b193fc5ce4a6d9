"""Reading what packages say that they need; the rest of an examination is tried as a command, in tests/processes."""

import pytest

from yoke.node.examination import is_within, requirement


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cryptography>=42", ("cryptography", ">=42")),
        ("gguf<0.20,>=0.19", ("gguf", "<0.20,>=0.19")),
        ("llama-cpp-python == 0.3.36", ("llama-cpp-python", "==0.3.36")),
        ("uvicorn[standard] (>=0.30)", ("uvicorn", ">=0.30")),
        ("psutil>=6; python_version >= '3.11'", ("psutil", ">=6")),
        ("numpy", ("numpy", "")),
        ("pytest>=8.3; extra == 'dev'", None),
        ("", None),
    ],
)
def test_a_requirement_is_a_name_and_versions(text, expected):
    assert requirement(text) == expected


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("42.0.1", ">=42", True),
        ("41.9", ">=42", False),
        ("0.19.0", "<0.20,>=0.19", True),
        ("0.20", "<0.20,>=0.19", False),
        ("0.3.36", "==0.3.36", True),
        ("0.3.36+cu124", "==0.3.36", True),
        ("0.3.3", "==0.3.36", False),
        ("1.10.0", ">=1.9", True),
        ("8", ">=8.0", True),
        ("8.0rc1", "<=8", True),
        ("3", ">2.9", True),
        ("1.0", "", True),
        ("unknown", ">=1", False),
    ],
)
def test_versions_are_compared_by_their_numbers(version, wanted, expected):
    assert is_within(version, wanted) is expected
