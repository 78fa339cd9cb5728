"""`torchrun -m RL2.trainer.spo_0p5 key=value ...`: the fixed (0.5, 0.5) target, on successful rollouts (3.3)."""

from RL2.trainer.launch import main

if __name__ == "__main__":
    main("spo_0p5")
