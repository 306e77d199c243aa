"""What pictures of evaluations have in common."""

from __future__ import annotations

BLUE, VERMILION = "#0072B2", "#D55E00"
"""Okabe and Ito's, which readers with any colour vision can tell apart."""

INK, MUTED, FAINT = "#1b1f24", "#57606a", "#d5dae0"
"""Of words, of what is less important, and of lines behind the data."""


def check_matplotlib(what: str, without: str) -> None:
    """Refuse before anything is computed.

    Args:
        what: of which a picture is to be drawn.
        without: the option that leaves it out.

    Raises:
        ImportError: saying what to do, if matplotlib is not there.
    """
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"The picture of a {what} needs matplotlib: pip install matplotlib; or add {without}."
        ) from error
