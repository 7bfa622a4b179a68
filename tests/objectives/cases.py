"""Configs of every objective, in every variant: what the properties are tested on."""

from typing import Any

from rlhf_jax.objectives.alol import ALoLConfig
from rlhf_jax.objectives.best_of_n import BestOfNConfig
from rlhf_jax.objectives.cpl import CPLConfig
from rlhf_jax.objectives.cpl_dense import DenseCPLConfig
from rlhf_jax.objectives.cpl_scored import ScoredCPLConfig
from rlhf_jax.objectives.dpo import DPOConfig
from rlhf_jax.objectives.grpo import GRPOConfig
from rlhf_jax.objectives.ilql import ILQLConfig
from rlhf_jax.objectives.iql import IQLConfig
from rlhf_jax.objectives.kto import KTOConfig
from rlhf_jax.objectives.online_dpo import OnlineDPOConfig
from rlhf_jax.objectives.orpo import ORPOConfig
from rlhf_jax.objectives.ppo import PPOConfig
from rlhf_jax.objectives.reinforce import ReinforceConfig
from rlhf_jax.objectives.reinforce_pp import ReinforcePPConfig
from rlhf_jax.objectives.reward_listwise import ListwiseRewardConfig
from rlhf_jax.objectives.reward_model import RewardModelConfig
from rlhf_jax.objectives.reward_process import ProcessRewardConfig
from rlhf_jax.objectives.reward_rating import RatingRewardConfig
from rlhf_jax.objectives.rloo import RLOOConfig
from rlhf_jax.objectives.sft import SFTConfig
from rlhf_jax.objectives.simpo import SimPOConfig
from rlhf_jax.objectives.tilted_bc import TiltedBCConfig
from rlhf_jax.objectives.unlikelihood import UnlikelihoodConfig
from rlhf_jax.objectives.weighted_bc import WeightedBCConfig

CASES: dict[str, Any] = {
  'sft': SFTConfig(),
  'weighted_bc': WeightedBCConfig(),
  'reward_model': RewardModelConfig(),
  'reward_model margin, centring': RewardModelConfig(
    margin_coefficient=0.7, center_coefficient=0.01
  ),
  'reward_listwise': ListwiseRewardConfig(),
  'reward_rating': RatingRewardConfig(),
  'reward_rating one cut': RatingRewardConfig(variant='classes', cutpoints=(0.1,)),
  'reward_rating classes': RatingRewardConfig(variant='classes', cutpoints=(-0.2, 0.1, 1.0)),
  'reward_process': ProcessRewardConfig(),
  'reward_process of ends': ProcessRewardConfig(between='nothing'),
  'reward_process binary': ProcessRewardConfig(variant='binary', between='nothing'),
  'dpo': DPOConfig(),
  'cdpo': DPOConfig(label_smoothing=0.1),
  'robust': DPOConfig(variant='robust', label_smoothing=0.1),
  'ipo': DPOConfig(variant='ipo'),
  'ipo mean': DPOConfig(variant='ipo', reduction='mean', nll_coefficient=0.5),
  'dpo, nll of tokens': DPOConfig(nll_coefficient=0.5, nll_normalization='token'),
  'hinge': DPOConfig(variant='hinge', beta=0.7),
  'simpo': SimPOConfig(),
  'simpo smoothed, nll': SimPOConfig(label_smoothing=0.1, nll_coefficient=0.3),
  'simpo, nll of tokens': SimPOConfig(nll_coefficient=0.3, nll_normalization='token'),
  'simpo hinge': SimPOConfig(variant='hinge', gamma=0.5),
  'orpo': ORPOConfig(),
  'orpo, nll of tokens': ORPOConfig(nll_normalization='token'),
  'orpo, nll of prompts': ORPOConfig(prompt_nll=True),
  'unlikelihood': UnlikelihoodConfig(),
  'unlikelihood token': UnlikelihoodConfig(variant='token', alpha=0.5),
  'cpl': CPLConfig(),
  'cpl discounted, imitating chosen': CPLConfig(
    gamma=0.9, lam=0.75, bc_coefficient=0.3, bc_responses='chosen'
  ),
  'cpl imitating chosen tokens': CPLConfig(
    bc_coefficient=0.3, bc_responses='chosen', bc_normalization='token'
  ),
  'cpl imitating tokens': CPLConfig(bc_coefficient=0.3, bc_normalization='token'),
  'cpl-kl, imitating all': CPLConfig(use_reference=True, bc_coefficient=1.0),
  'cpl_dense': DenseCPLConfig(),
  'cpl_dense kl, discounted, imitating': DenseCPLConfig(
    use_reference=True, gamma=0.9, lam=0.75, bc_coefficient=0.3
  ),
  'cpl_scored': ScoredCPLConfig(),
  'cpl_scored in groups': ScoredCPLConfig(group_size=2, bc_coefficient=0.3),
  'cpl_scored kl, in groups': ScoredCPLConfig(group_size=2, use_reference=True),
  'kto': KTOConfig(desirable_weight=1.3),
  'alol': ALoLConfig(),
  'alol token': ALoLConfig(variant='token', clip=0.2),
  'alol reference-free': ALoLConfig(variant='reference_free'),
  'alol kl': ALoLConfig(variant='kl'),
  'ilql': ILQLConfig(),
  'ilql weighted': ILQLConfig(awac_beta=0.5, gamma=0.9, expectile=0.8, cql_coefficient=0.5),
  'iql': IQLConfig(),
  'ppo': PPOConfig(value_coefficient=0.5),
  'ppo, value loss by itself': PPOConfig(value_coefficient=0.5, value_normalization='own'),
  'rloo': RLOOConfig(),
  'rloo token': RLOOConfig(ratio='token'),
  'reinforce': ReinforceConfig(),
  'reinforce_pp': ReinforcePPConfig(),
  'reinforce_pp kl in loss': ReinforcePPConfig(kl_in_loss=True, loss_normalization='sequence'),
  'reinforce_pp dual clip': ReinforcePPConfig(dual_clip=1.3),
  'grpo': GRPOConfig(),
  'grpo token': GRPOConfig(loss_normalization='token', clip_high=0.28, kl_coefficient=0.0),
  'grpo dual clip': GRPOConfig(dual_clip=1.3, epsilon=1e-6),
  'grpo constant': GRPOConfig(loss_normalization='constant', constant=10.0),
  'grpo sequence ratio': GRPOConfig(ratio='sequence', clip=0.01, clip_high=0.02),
  'online_dpo': OnlineDPOConfig(),
  'online_dpo ipo': OnlineDPOConfig(variant='ipo'),
  'online_dpo hinge': OnlineDPOConfig(variant='hinge', beta=0.7),
  'best_of_n': BestOfNConfig(),
  'tilted_bc': TiltedBCConfig(),
}
