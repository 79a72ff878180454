import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def golden():
    """Golden cases by id."""
    cases = json.loads((Path(__file__).parent / "golden" / "golden_cases.json").read_text())["cases"]
    return {case["id"]: case for case in cases}
