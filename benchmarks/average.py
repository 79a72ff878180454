"""Average the weights of checkpoints of one network, such as parts of a run (model soups, arXiv:2203.05482).

    python benchmarks/average.py weights/parameternet_600m.tin200/model.safetensors \\
        runs/parameternet_600m_tin200_part5/best.safetensors --out runs/average
    parameternet val runs/average --data data/val.tar

Counters, which are integers, and the config are those of the first checkpoint.
"""

import argparse
import shutil
from pathlib import Path

import torch

from parameternet import weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder")
    options = parser.parse_args()
    states = [weights.read(path) for path in options.files]
    first = states[0]
    if any(state.keys() != first.keys() for state in states):
        raise SystemExit("the checkpoints have tensors of different names: they are not of one network")
    average = {
        name: torch.stack([state[name].float() for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }
    options.out.mkdir(parents=True, exist_ok=True)
    weights.save(average, options.out / "model.safetensors", weights.metadata(options.files[0]))
    shutil.copy(options.files[0].with_name("config.json"), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
