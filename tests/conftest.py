import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def golden():
    """Golden cases by id."""
    cases = json.loads((Path(__file__).parent / "golden" / "golden_cases.json").read_text())["cases"]
    return {case["id"]: case for case in cases}
