"""Classify images: `Predictor` returns `Result`s, `draw` plots them, `predict_to_file` writes many to a file.

>>> predictor = Predictor()  # doctest: +SKIP
>>> predictor.predict("cat.jpg")[0].labels[0]  # doctest: +SKIP
'tabby'
"""

from parameternet.prediction.bulk import Summary, predict_to_file
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

__all__ = [
    "DEFAULT_MODEL",
    "ImageLike",
    "Predictor",
    "Result",
    "Summary",
    "class_names",
    "draw",
    "expand",
    "load",
    "predict_to_file",
    "read_image",
]
