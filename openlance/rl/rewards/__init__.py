"""Rewards: functions from prompts, media and metadata to numbers in [0, 1], and their weighted sum."""

from openlance.rl.rewards.base import Reward, RewardError, Rewards
from openlance.rl.rewards.named import named_reward, parse_rewards
from openlance.rl.rewards.simple import exact_match

__all__ = ["Reward", "RewardError", "Rewards", "exact_match", "named_reward", "parse_rewards"]
