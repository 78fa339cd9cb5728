"""`torchrun -m RL2.trainer.ppo key=value ...`: policy gradient with PPO's ratio and the advantages of Dr. GRPO."""

from RL2.trainer.launch import main

if __name__ == "__main__":
    main("ppo")
