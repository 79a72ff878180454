"""Measure and plot which experts images use.

>>> routing = measure(Predictor("parameternet_50m.tin200"), find_images(["val.tar"]))  # doctest: +SKIP
>>> draw(routing, "routing.png")  # doctest: +SKIP
"""

from parameternet.deprecation import moved
from parameternet.routing.ablation import Ablated, ablate
from parameternet.routing.measure import LayerRouting, Routing, Row, Sample, find_images, measure
from parameternet.routing.plot import draw

__all__ = ["Ablated", "LayerRouting", "Routing", "Row", "Sample", "ablate", "draw", "find_images", "measure"]

__getattr__ = moved(
    __name__,
    {
        "Picture": "parameternet.routing:Sample",
        "dynamic_layers": "parameternet.layers.recording:dynamic_layers",
        "find_pictures": "parameternet.routing:find_images",
    },
)
