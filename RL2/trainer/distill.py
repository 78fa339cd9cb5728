"""`torchrun -m RL2.trainer.distill key=value ...`: on-policy distillation, the divergence from a teacher."""

from RL2.trainer.launch import main

if __name__ == "__main__":
    main("distill")
