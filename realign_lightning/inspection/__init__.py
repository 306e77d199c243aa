"""Look at dual-preference pairs: one self-contained HTML page of images, answers, differences and provenance."""

from realign_lightning.inspection.command import main
from realign_lightning.inspection.page import PageReport, write_page

__all__ = ["PageReport", "main", "write_page"]
