"""Checkpoints for others: their cards, and their way to the Hub."""

from parameternet.hub.card import write_card
from parameternet.hub.publish import File, OtherWeights, Published, PublishError, publish

__all__ = ["File", "OtherWeights", "PublishError", "Published", "publish", "write_card"]
