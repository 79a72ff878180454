"""The card says what the choice of experts and the gain per image are worth."""

import json
import re

from parameternet import weights
from parameternet.hub import write_card

NAME = "parameternet_50m.tin200"


def test_a_card_has_the_recorded_rows_in_words(tmp_path):
    folder = tmp_path / NAME
    folder.mkdir()
    for file in weights.find(NAME).parent.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["results"]["ablation"] = {"own": 32.19, "mean weights": 21.5, "mean shares": 26.55, "mean sum": 26.01}
    (folder / "config.json").write_text(json.dumps(config))
    rows = re.findall(r"^\| ((?:the image's own|average).*) \| ([\d.]+) \|$", write_card(folder), re.MULTILINE)
    assert [float(value) for _, value in rows] == [32.19, 26.55, 26.01, 21.5]
    del config["results"]["ablation"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "a static network" not in write_card(folder)
