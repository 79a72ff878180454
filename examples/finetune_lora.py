"""Fine-tune with peft (LoRA on routers and static convolutions, plus a new classifier), then merge.

    pip install "parameternet[clients]"
    python examples/finetune_lora.py FOLDER --steps 20

FOLDER has `train/CLASS/IMAGE`. Prints the number of trained parameters, the loss, and the largest difference between
outputs before and after merging. The merged network is a plain timm model.
"""

import argparse

import peft
import timm
import torch
from torch import nn

import parameternet


def adapt(model, rank):
    """Apply LoRA to every router and every static convolution that is not depthwise; train the classifier in full."""
    routers = [name for name, module in model.named_modules() if isinstance(module, parameternet.Router)]
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1]
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=convs, modules_to_save=["classifier"],
        target_parameters=[f"{name}.weight" for name in routers],  # a router is not an nn.Linear, so name its weight
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default="parameternet_50m")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--output", help="folder for the adapter")
    options = parser.parse_args()

    torch.manual_seed(0)
    data = timm.data.create_dataset("", f"{options.folder}/train")
    model = timm.create_model(options.model, pretrained=True, num_classes=len(data.reader.class_to_idx))
    data.transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    loader = torch.utils.data.DataLoader(data, 8, shuffle=True, drop_last=True)
    adapted = adapt(model, options.rank)
    adapted.print_trainable_parameters()

    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, options.lr, weight_decay=0.0)
    adapted.eval()  # keep the batch norm statistics of the frozen network
    step, losses = 0, []
    while step < options.steps:
        for images, labels in loader:
            loss = nn.functional.cross_entropy(adapted(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            step += 1
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

    if options.output:
        adapted.save_pretrained(options.output)  # only the adapter and the classifier
    images = torch.stack([data[index][0] for index in range(2)])
    with torch.no_grad():
        expected = adapted(images)
        merged = adapted.merge_and_unload()
        print(f"{type(merged).__name__} merged, largest difference {(merged(images) - expected).abs().max():.1e}")


if __name__ == "__main__":
    main()
