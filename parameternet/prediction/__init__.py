"""Classify images: `Predictor` gives `Result`s, `draw` draws them.

>>> predictor = Predictor()  # doctest: +SKIP
>>> predictor.predict("cat.jpg")[0].labels[0]  # doctest: +SKIP
'tabby'
"""

from parameternet.prediction.drawing import draw
from parameternet.prediction.predictor import (
    DEFAULT_MODEL,
    ImageLike,
    Predictor,
    Result,
    class_names,
    expand,
    load,
    read_image,
)

__all__ = ["DEFAULT_MODEL", "ImageLike", "Predictor", "Result", "class_names", "draw", "expand", "load", "read_image"]
