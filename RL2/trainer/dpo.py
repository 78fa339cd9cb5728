"""`torchrun -m RL2.trainer.dpo key=value ...`: a policy that prefers the chosen of two responses."""

from RL2.trainer.launch import main

if __name__ == "__main__":
    main("dpo")
