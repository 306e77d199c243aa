"""The parts behind :mod:`realign_lightning.preferences.mask`, which is where to import from."""
