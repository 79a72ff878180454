# SPDX-License-Identifier: AGPL-3.0-or-later
"""`parameternet-yolo`: Ultralytics' own command, with our layers known to it."""


def main() -> None:
    """Register, then do what `yolo` does."""
    from ultralytics.cfg import entrypoint

    import parameternet.yolo  # noqa: F401

    entrypoint()
