"""Fine-tune a weights folder with transformers' Trainer on a folder of class folders.

    pip install "parameternet[clients]"
    python examples/finetune_transformers.py FOLDER --weights weights/parameternet_50m.tin200 --output finetuned

FOLDER has `train/CLASS/IMAGE`. Prints the loss before and after training, and the largest difference of the logits
after reloading.
"""

import argparse

import torch
from torchvision.datasets import ImageFolder
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

import parameternet  # noqa: F401  registers the networks with timm, where transformers finds them


class Rows(torch.utils.data.Dataset):
    """Build the inputs of transformers' models: `pixel_values` and `labels`."""

    def __init__(self, folder, processor):
        self.folder, self.processor = folder, processor

    def __len__(self):
        return len(self.folder)

    def __getitem__(self, index):
        image, label = self.folder[index]
        return {"pixel_values": self.processor(image)["pixel_values"][0], "labels": label}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--weights", default="weights/parameternet_50m.tin200", help="a folder, or a Hub repository")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="finetuned")
    options = parser.parse_args()

    set_seed(0)
    folder = ImageFolder(f"{options.folder}/train")
    model = AutoModelForImageClassification.from_pretrained(
        options.weights, num_labels=len(folder.classes), ignore_mismatched_sizes=True
    )
    model.config.id2label = dict(enumerate(folder.classes))
    model.config.label2id = folder.class_to_idx
    processor = AutoImageProcessor.from_pretrained(options.weights)
    arguments = TrainingArguments(
        output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=8, learning_rate=1e-3,
        weight_decay=0.05, logging_steps=options.steps, save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(folder, processor))
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    print(f"loss {before:.3f} before, {after:.3f} after {options.steps} steps")

    trainer.save_model(options.output)
    processor.save_pretrained(options.output)
    again = AutoModelForImageClassification.from_pretrained(options.output).eval()
    images = torch.stack([trainer.train_dataset[index]["pixel_values"] for index in range(2)])
    with torch.no_grad():
        difference = (again(images).logits - model.cpu().eval()(images).logits).abs().max()
    print(f"loaded from {options.output}: classes {folder.classes}, logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
