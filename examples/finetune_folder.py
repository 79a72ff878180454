"""Fine-tune on a folder of class folders, and print accuracy after each epoch.

    pip install "parameternet[demo]"
    python examples/finetune_folder.py FOLDER --epochs 5

FOLDER has `train/CLASS/IMAGE` and `val/CLASS/IMAGE`.
"""

import argparse

import timm
import torch
from torch import nn

import parameternet  # registers the networks with timm


@torch.no_grad()
def accuracy(model, loader):
    model.eval()
    right = torch.cat([model(images).argmax(1) == labels for images, labels in loader])
    return 100 * right.float().mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--model", default="dynamic_efficientnet_lite0", help="or parameternet_50m, any timm name")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--size", type=int, help="image size in pixels; default: the checkpoint's")
    parser.add_argument("--lr", type=float, default=5e-4)
    options = parser.parse_args()

    timm.utils.random_seed(0)  # of torch, numpy and random, which timm's augmentation uses
    data = {split: timm.data.create_dataset("", f"{options.folder}/{split}") for split in ("train", "val")}
    classes = data["train"].reader.class_to_idx
    assert data["val"].reader.class_to_idx == classes, f"train has the classes {[*classes]}, val has others"
    model = timm.create_model(options.model, pretrained=True, num_classes=len(classes))
    config = timm.data.resolve_model_data_config(model)
    if options.size:
        config["input_size"] = (3, options.size, options.size)
    data["train"].transform = timm.data.create_transform(**config, is_training=True, scale=(0.4, 1.0))
    data["val"].transform = timm.data.create_transform(**config)
    train = torch.utils.data.DataLoader(data["train"], options.batch_size, shuffle=True)
    val = torch.utils.data.DataLoader(data["val"], options.batch_size)

    # No weight decay for biases and norms; routers without normalisation get a lower learning rate.
    optimizer = torch.optim.AdamW(parameternet.param_groups(model, options.lr, weight_decay=0.05))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(train))
    for epoch in range(1, options.epochs + 1):
        model.train()
        for images, labels in train:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: accuracy {accuracy(model, val):.1f} %", flush=True)


if __name__ == "__main__":
    main()
