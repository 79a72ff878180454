"""A network with its loss, gradients, optimizer, schedule and EMA."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from timm.data.random_erasing import RandomErasing
from timm.utils import ModelEmaV3
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from parameternet.layers import match_routers
from parameternet.training import build
from parameternet.training.cuda_graph import GraphedLoss
from parameternet.training.distributed import Place
from parameternet.training.divergence import first_not_finite
from parameternet.training.errors import RecipeError
from parameternet.training.evaluate import autocast
from parameternet.training.randomness import STEP, mix, seed_all
from parameternet.training.recipe import Recipe


class Learner:
    """Train a network step by step.

    `model` has the weights; `network` is the wrapped model that is called during training.

    Args:
        r: the recipe.
        num_classes: outputs of the network.
        place: this process; gradients are averaged over all processes.
        updates_per_epoch: for the learning rate schedule.
        start: False if a checkpoint is loaded later, so `init` need not be read.

    Raises:
        RecipeError, CheckpointError: see `build`.
    """

    def __init__(self, r: Recipe, num_classes: int, place: Place, updates_per_epoch: int, start: bool):
        self.r, self.place, self.share = r, place, r.batch_size // place.world
        self.model = self._make_model(num_classes, start)
        self.frozen = build.freeze(self.model, r.freeze)
        self.optimizer = build.make_optimizer(r, self.model)
        self.scheduler = build.make_scheduler(r, self.optimizer, updates_per_epoch)
        self.ema = ModelEmaV3(self.model, decay=r.ema_decay, use_warmup=True) if r.ema_decay else None
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=r.amp == "float16")
        self.mixup = build.make_mixup(r, num_classes)
        self.criterion = build.make_loss(r)
        erases = r.reprob and not r.no_aug
        self.erase = RandomErasing(r.reprob, mode=r.remode, device=place.device) if erases else None
        self.network = self._wrapped()
        self.graph: GraphedLoss | None = None
        if r.cuda_graph and (place.device.type != "cuda" or place.world > 1):
            raise RecipeError(
                f"cuda_graph needs one process on a CUDA device, got {place.world} on {place.device}: set "
                "cuda_graph=false"
            )
        if r.cuda_graph:
            torch.backends.cudnn.benchmark = True  # shapes do not change

    def _make_model(self, num_classes: int, start: bool) -> nn.Module:
        r, device = self.r, self.place.device
        model = build.make_model(r, num_classes, start=start).to(device)
        if r.sync_bn and self.place.world > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if r.channels_last:
            model = model.to(memory_format=torch.channels_last)
        build.check_sizes(r, model, num_classes, device, self.share)
        return model

    def _wrapped(self) -> nn.Module:
        network = torch.compile(self.model) if self.r.compile else self.model
        if self.place.world == 1:
            return network
        ids = [self.place.device.index] if self.place.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=ids)

    @property
    def evaluated(self) -> nn.Module:
        """The network to validate and save: the EMA if there is one."""
        return self.ema.module if self.ema else self.model

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return self.optimizer.param_groups[0]["lr"]

    def start_epoch(self, epoch: int) -> None:
        """Put the network into training mode, except frozen parts, and switch mixing on or off."""
        self.network.train()
        for module in self.frozen:
            module.eval()
        if self.mixup:
            self.mixup.mixup_enabled = not self.r.mixup_off_epoch or epoch < self.r.mixup_off_epoch

    def backward(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> Tensor:
        """Accumulate the gradients of one batch, and return its mean loss.

        Args:
            images: (B, 3, H, W), normalised.
            labels: (B,), or (B, classes) with a teacher.
            epoch, step: position in the run, which seeds all random numbers.
        """
        seed_all(mix(STEP, self.r.seed, epoch, step, self.place.rank))
        updating = (step + 1) % self.r.accumulate == 0
        if not len(images):
            return self._backward_of_nothing(self.r.size_at(epoch), updating)
        images, labels = self._prepare(images, labels)
        if self.r.cuda_graph and len(images) == self.r.batch_size:
            return self._replay(images, labels)
        with nullcontext() if updating or self.place.world == 1 else self.network.no_sync():
            loss = self._loss(images, labels)
            self.scaler.scale(loss / self.r.accumulate).backward()
        return loss.detach()

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with autocast(self.place.device, self.r.amp):
            return self.criterion(self.network(images), labels)

    def _backward_of_nothing(self, size: int, updating: bool) -> Tensor:
        """Produce zero gradients for a batch of unreadable images; other processes wait for them."""
        with nullcontext() if updating or self.place.world == 1 else self.network.no_sync():
            with autocast(self.place.device, self.r.amp):
                loss = self.network(torch.zeros(2, 3, size, size, device=self.place.device)).sum() * 0
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _replay(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.graph is None or not self.graph.takes(images, labels):
            self.graph = None  # frees its memory
            self.graph = GraphedLoss(self.model, self._loss, images, labels)
        return self.graph(images, labels)

    def _prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Apply erasing, mixing and memory format to a batch."""
        if len(images) == 1 < self.share:  # batch norm needs two values per channel
            images, labels = torch.cat([images] * 2), torch.cat([labels] * 2)
        if self.erase:
            images = self.erase(images)
        if self.mixup:
            even = len(images) // 2 * 2  # mixing pairs images, and unreadable ones may leave an odd number
            images, labels = self.mixup(images[:even], labels[:even])
        if self.r.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def update(self, number: int) -> None:
        """Update the weights from the gradients; `number` counts updates from 1."""
        if self.r.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.model.parameters(), self.r.clip_grad, mode=self.r.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model, step=number)
        if self.scheduler:
            self.scheduler.step_update(number)

    def not_finite(self) -> dict[str, str | None]:
        """Return the name of the first weight or EMA tensor with NaN or infinity; None if there is none."""
        networks = {"weights": self.model} | ({"averaged weights": self.ema.module} if self.ema else {})
        return {words: first_not_finite(network.state_dict().items()) for words, network in networks.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return all state that changes during training; the schedule is a function of the number of updates."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load the state that `state_dict` returned, ignoring other keys."""
        match_routers(self.model, state["model"])  # of a run that an older release began
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._match_memory_formats()
        self.scaler.load_state_dict(state["scaler"])
        if self.ema:
            match_routers(self.ema.module, state["ema"])
            self.ema.module.load_state_dict(state["ema"])

    def _match_memory_formats(self) -> None:
        """Store moments as their parameters are: fused optimizers pair them by memory, whatever their strides say."""
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)
