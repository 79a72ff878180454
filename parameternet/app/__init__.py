"""A page that shows what a network does with an image: `build` makes it, `Explainer` computes what it shows.

>>> from parameternet.app import build  # doctest: +SKIP
>>> build("dynamic_efficientnet_lite0").launch()  # doctest: +SKIP
"""

from parameternet.app.explainer import Cost, Explainer, Explanation
from parameternet.app.heat_map import draw
from parameternet.app.page import build

__all__ = ["Cost", "Explainer", "Explanation", "build", "draw"]
