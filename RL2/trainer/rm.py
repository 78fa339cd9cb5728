"""`torchrun -m RL2.trainer.rm key=value ...`: a reward model from pairs of responses."""

from RL2.trainer.launch import main

if __name__ == "__main__":
    main("rm")
