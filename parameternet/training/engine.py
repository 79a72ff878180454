"""Moved in 0.2; these names work for one more release."""

from parameternet.deprecation import moved

__getattr__ = moved(
    __name__,
    {
        "Progress": "parameternet.training.meters:Progress",
        "StopSignals": "parameternet.training.signals:StopSignals",
        "Trainer": "parameternet.training.trainer:Trainer",
        "run": "parameternet.training.trainer:run",
    },
)
