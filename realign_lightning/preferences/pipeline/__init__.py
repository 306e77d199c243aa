"""The stages of a build, one after the other; :class:`~realign_lightning.preferences.PreferenceBuilder` runs them."""
