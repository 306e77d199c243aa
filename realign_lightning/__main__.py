"""``python -m realign_lightning``: the command line where the script is not on the path."""

from realign_lightning.cli import main

main()
