"""Release checkpoints from runs, write their model cards, and publish them on the Hub."""

from parameternet.hub.card_text import write_card
from parameternet.hub.publish import File, OtherWeights, Published, PublishError, publish
from parameternet.hub.release import release

__all__ = ["File", "OtherWeights", "PublishError", "Published", "publish", "release", "write_card"]
