"""Run forward and backward as a CUDA graph, captured once and replayed with one launch per step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_WARM_UP = 2  # steps before capture, in which libraries allocate their workspaces

Loss = Callable[[Tensor, Tensor], Tensor]


class GraphedLoss:
    """Compute gradients of `loss(images, labels)` for batches of one shape with a CUDA graph.

    A graph reads and writes the same memory at each replay. So batches are copied into its tensors, and its gradients
    are assigned to the parameters again after each replay, because the optimizer may have set them to None.

    Args:
        model: its parameters get gradients, and its buffers are updated as in a normal step.
        loss: forward pass and criterion.
        images, labels: an example batch; later batches must have its shape.
    """

    def __init__(self, model: nn.Module, loss: Loss, images: Tensor, labels: Tensor):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.images, self.labels = images.clone(), labels.clone()
        buffers = [buffer.clone() for buffer in model.buffers()]
        self._warm_up(model, loss)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = loss(self.images, self.labels)
            self.loss.backward()
        self.gradients = [p.grad for p in self.parameters]
        model.zero_grad()
        with torch.no_grad():  # undo the warm-up's changes to running statistics
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)

    def _warm_up(self, model: nn.Module, loss: Loss) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                model.zero_grad()
                loss(self.images, self.labels).backward()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad()  # so that the graph allocates gradients instead of adding to them

    def takes(self, images: Tensor, labels: Tensor) -> bool:
        """Return whether a batch has the captured shape."""
        return images.shape == self.images.shape and labels.shape == self.labels.shape

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Set the gradients for a batch and return its loss."""
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss.detach().clone()
