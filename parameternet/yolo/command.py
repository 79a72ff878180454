# SPDX-License-Identifier: AGPL-3.0-or-later
"""`parameternet-yolo`: Ultralytics' own command with our layers registered."""


def main() -> None:
    """Register our layers, then run `yolo`."""
    from ultralytics.cfg import entrypoint

    import parameternet.yolo  # noqa: F401

    entrypoint()
