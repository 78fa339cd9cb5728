"""RL2: Ray Less Reinforcement Learning. Start reading at trainer/rl.py, then objectives/spo.py."""

__version__ = "0.1.0"
