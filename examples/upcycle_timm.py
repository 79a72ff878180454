"""Make a timm network dynamic: more parameters, the same outputs.

    python examples/upcycle_timm.py resnet18

Prints the number of parameters before and after, here 11.69 M and 45.18 M, and the largest difference of outputs,
6e-08.
"""

import argparse

import timm
import torch

import parameternet


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", default="resnet18", help="any timm name")
    parser.add_argument("--pretrained", action="store_true", help="download the weights")
    parser.add_argument("--num-experts", type=int, default=4)
    options = parser.parse_args()

    torch.manual_seed(0)
    dense = timm.create_model(options.name, pretrained=options.pretrained).eval()
    dynamic = parameternet.upcycle(dense, num_experts=options.num_experts).eval()

    images = torch.randn(2, *timm.data.resolve_model_data_config(dense)["input_size"])
    with torch.inference_mode():
        expected, found = dense(images), dynamic(images)
    print(f"outputs up to {expected.abs().max():.3f}, largest difference {(found - expected).abs().max():.1e}")
    before, after = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (dense, dynamic))
    print(f"parameters {before:.2f} M before, {after:.2f} M after")
    for layer in dynamic.upcycling.layers[:5]:
        print(layer.name, layer.kind, layer.left or "dynamic")  # which layers were converted, and why others were not


if __name__ == "__main__":
    main()
