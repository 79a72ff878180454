"""A page that shows how a network classifies an image: `build` creates it, `Explainer` computes its content.

>>> from parameternet.app import build  # doctest: +SKIP
>>> build("dynamic_efficientnet_lite0").launch()  # doctest: +SKIP
"""

from parameternet.app.explainer import Cost, Explainer, Explanation
from parameternet.app.heat_map import draw
from parameternet.app.page import build

__all__ = ["Cost", "Explainer", "Explanation", "build", "draw"]
