"""`torchrun -m RL2.trainer.spo key=value ...`: KL to the most likely token, on successful rollouts (3.1 and 3.2)."""

from RL2.trainer.launch import main

if __name__ == "__main__":
    main("spo")
