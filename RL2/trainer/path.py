"""`torchrun -m RL2.trainer.path key=value ...`: the later program of the fork, `spo` with its names and defaults."""

from RL2.trainer.launch import main

if __name__ == "__main__":
    main("path")
