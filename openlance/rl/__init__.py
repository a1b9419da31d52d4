"""Reinforcement learning: rollouts of groups, rewards, and what an update makes of them."""
