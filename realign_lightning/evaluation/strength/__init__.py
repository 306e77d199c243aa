"""How much of an adapter to take: hallucination against skills that its training never touched."""

from realign_lightning.evaluation.strength.measuring import Measures, measure_strengths
from realign_lightning.evaluation.strength.picture import draw
from realign_lightning.evaluation.strength.sweep import Axis, Point, Sweep, read_scales, read_skill

__all__ = ["Axis", "Measures", "Point", "Sweep", "draw", "measure_strengths", "read_scales", "read_skill"]
