"""Former place of `card_data` and `card_text`."""

from parameternet.deprecation import moved

__getattr__ = moved(
    __name__,
    {
        "COMPARISONS": "parameternet.hub.card_data:COMPARISONS",
        "describe": "parameternet.hub.card_data:describe",
        "write_card": "parameternet.hub.card_text:write_card",
    },
)
