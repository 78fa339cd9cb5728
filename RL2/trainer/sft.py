"""`torchrun -m RL2.trainer.sft key=value ...`: supervised fine-tuning on the responses of a data set."""

from RL2.trainer.launch import main

if __name__ == "__main__":
    main("sft")
