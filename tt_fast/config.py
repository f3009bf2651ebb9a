"""Every setting, as frozen dataclasses: the model, its training, one plan.

Derived values are properties. Change one field with ``dataclasses.replace``. Nothing here imports
torch, so a config can be read anywhere.
"""

from __future__ import annotations

import dataclasses
import numbers
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tt_fast.validate import require, require_choice, require_int, require_number

GoalValueMask = Literal["correct", "original"]
Strategy = Literal["quantile", "uniform"]
Precision = Literal["float32", "bfloat16"]
TokenStorage = Literal["auto", "memory", "file"]
Overflow = Literal["crop", "grow"]

#: Kinds of tokens, in the order in which a transition holds them.
TOKEN_KINDS = ("observation", "action", "reward", "value")

#: Most steps of a plan, beams, and children of a beam.
MAX_PLAN_SIZE = 2**20
#: Discount of a plan where neither the config nor a checkpoint gives one (config/offline.py:24).
DEFAULT_DISCOUNT = 0.99

#: Longest `ModelConfig.block_size`, in tokens: there the attention mask alone takes a gigabyte.
#: Hopper's default window has 159; ten transitions of D4RL's widest environments, some thousand.
MAX_BLOCK_SIZE = 2**15
#: What may divide logits: no quotient of theirs overflows float32.
TEMPERATURES = (1e-30, 1e30)


@dataclass(frozen=True)
class ModelConfig:
    """Shape and regularisation of a `TrajectoryTransformer`; defaults are the paper's.

    Source: appendix A of the paper; trajectory/models/transformers.py and config/offline.py:22-53.
    """

    observation_dim: int
    """Width of an observation."""
    action_dim: int
    """Width of an action."""
    vocab_size: int = 100
    """Bins per dimension; token id `vocab_size` is the stop token."""
    num_transitions: int = 10
    """Window length in transitions."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads a block; must divide `embed_dim`."""
    embed_dim: int = 128
    """Width of the residual stream."""
    embed_dropout: float = 0.1
    """Dropout probability after the embedding."""
    residual_dropout: float = 0.1
    """Dropout probability on what a block adds."""
    attention_dropout: float = 0.1
    """Dropout probability on attention weights."""
    action_weight: float = 5.0
    """Weight of action tokens in the loss."""
    reward_weight: float = 1.0
    """Weight of reward tokens in the loss."""
    value_weight: float = 1.0
    """Weight of value tokens in the loss."""
    goal_conditioned: bool = False
    """Prepend the tokens of a goal observation."""
    goal_value_mask: GoalValueMask = "correct"
    """With a goal: "correct" hides value tokens as keys; "original" hides the same columns as the
    original's unshifted mask, for its weights (transformers.py:250-262)."""

    def __post_init__(self) -> None:
        for name in ("observation_dim", "action_dim", "num_transitions", "num_layers", "num_heads"):
            require_int(name, getattr(self, name), 1)
        require_int("block_size", self.block_size, 1, MAX_BLOCK_SIZE)
        require_int("vocab_size", self.vocab_size, 2)
        require_int("embed_dim", self.embed_dim, 1)
        divides = self.embed_dim % self.num_heads == 0
        require(divides, "embed_dim", f"a multiple of num_heads={self.num_heads}", self.embed_dim)
        for name in ("embed_dropout", "residual_dropout", "attention_dropout"):
            require_number(name, getattr(self, name), 0.0, 1.0)
        for name in ("action_weight", "reward_weight", "value_weight"):
            require_number(name, getattr(self, name), 0.0)
        require_choice("goal_conditioned", self.goal_conditioned, (False, True))
        require_choice("goal_value_mask", self.goal_value_mask, ("correct", "original"))
        _make_plain(self)

    @property
    def transition_dim(self) -> int:
        """Tokens of one transition: observation, action, reward, value."""
        return self.observation_dim + self.action_dim + 2

    @property
    def block_size(self) -> int:
        """Longest token sequence the model takes, a goal's tokens not counted; at most
        `MAX_BLOCK_SIZE`."""
        return self.num_transitions * self.transition_dim - 1

    @property
    def goal_len(self) -> int:
        """Tokens that a goal prepends (0 without one)."""
        return self.observation_dim if self.goal_conditioned else 0


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained; defaults are the original's (config/offline.py:14-53).

    With no budget (`max_tokens`, `max_epochs`, `max_windows`, `max_minutes`) training runs the
    original's: 50 million windows. With several, the first one reached ends it.
    """

    batch_size: int = 256
    """Windows per optimiser step."""
    pass_windows: int | None = None
    """Windows that go through the model at once, their gradients added up to a step's; less is less
    memory. None: some 4,096 tokens on the CPU, all windows of a step elsewhere."""
    learning_rate: float = 6e-4
    """Peak learning rate, reached after warm-up."""
    weight_decay: float = 0.1
    """Decay of matrix weights (AdamW); biases, LayerNorm and embeddings have none."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging coefficients."""
    grad_clip: float = 1.0
    """Largest global L2 norm of the gradient."""
    max_tokens: int | None = None
    """Budget in target tokens, stop tokens not counted."""
    max_epochs: float | None = None
    """Budget in passes over all windows."""
    max_windows: int | None = None
    """Budget in windows."""
    max_minutes: float | None = None
    """Budget in minutes of wall time; the learning rate then follows the clock."""
    num_bins: int = 100
    """Bins per dimension of the discretizer."""
    strategy: Strategy = "quantile"
    """Bins of equal mass or of equal width."""
    discount: float = 0.99
    """Discount of the value column."""
    termination_penalty: float | None = -100.0
    """Reward that replaces the one at a real termination; None keeps it."""
    step: int = 1
    """Environment steps between the transitions of a window."""
    max_path_length: int = 1000
    """Longest episode, in steps; windows are not trained past it."""
    seed: int = 0
    """Seed of initial weights, window order and dropout."""
    device: str = "auto"
    """torch device; "auto" takes cuda, then mps, then cpu."""
    precision: Precision = "float32"
    """Arithmetic of forward and backward; weights stay float32. On a processor bfloat16 is faster
    with AMX or AMD's AVX-512; elsewhere it may be slower."""
    ema_decay: float | None = None
    """Checkpoints hold the average of the weights over steps, an old one's part shrinking by this
    factor a step; None: the weights themselves."""
    compile: bool = False
    """On a GPU, let torch.compile fuse the step and record it as CUDA graphs."""
    eval_every: int | None = None
    """Optimiser steps between two evaluations; None: none."""
    patience: int | None = None
    """Evaluations in a row without a better score that end training; None: never."""
    log_steps: int = 20
    """Optimiser steps between two rows of metrics.csv."""
    checkpoint_steps: int = 500
    """Optimiser steps between two checkpoints."""
    checkpoint_minutes: float = 5.0
    """Minutes after which a checkpoint is written even if `checkpoint_steps` has not passed."""
    token_storage: TokenStorage = "auto"
    """Where the dataset's tokens are kept: "memory", or a temporary "file" in the run's folder, of
    which memory holds what it can; "auto": a file where they would take over a quarter of the
    memory that is free. The result is the same."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "step", "max_path_length", "log_steps", "checkpoint_steps"):
            require_int(name, getattr(self, name), 1)
        longest = self.max_path_length
        require(self.step <= longest, "step", f"at most max_path_length={longest}", self.step)
        if self.pass_windows is not None:
            require_int("pass_windows", self.pass_windows, 1)
        require_int("num_bins", self.num_bins, 2)
        require_int("seed", self.seed, 0, 2**63 - 1)
        require_number("learning_rate", self.learning_rate, 0.0, open_low=True)
        require_number("weight_decay", self.weight_decay, 0.0)
        is_pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        require(is_pair, "betas", "a tuple of two numbers", self.betas)
        for beta in self.betas:
            require_number("betas", beta, 0.0, 1.0)
            require(beta < 1.0, "betas", "numbers in [0, 1)", self.betas)
        require_number("grad_clip", self.grad_clip, 0.0, open_low=True)
        require_number("discount", self.discount, 0.0, 1.0)
        require_number("checkpoint_minutes", self.checkpoint_minutes, 0.0, open_low=True)
        if self.termination_penalty is not None:
            require_number("termination_penalty", self.termination_penalty)
        if self.ema_decay is not None:
            require_number("ema_decay", self.ema_decay, 0.0, 1.0)
            require(self.ema_decay < 1.0, "ema_decay", "a number in [0, 1)", self.ema_decay)
        require_choice("compile", self.compile, (False, True))
        for name in ("max_tokens", "max_windows", "eval_every", "patience"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
        for name in ("max_epochs", "max_minutes"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0.0, open_low=True)
        fits = self.patience is None or self.eval_every is not None
        require(fits, "patience", "None, as eval_every is None", self.patience)
        require_choice("strategy", self.strategy, ("quantile", "uniform"))
        require_choice("precision", self.precision, ("float32", "bfloat16"))
        require_choice("token_storage", self.token_storage, ("auto", "memory", "file"))
        _make_plain(self)


@dataclass(frozen=True)
class PlanConfig:
    """One beam plan; defaults are the original's (config/offline.py:55-80).

    `k_*` keep the k likeliest tokens, `cdf_*` remove the given mass of the least likely ones; both
    apply if set, cdf first. Source: trajectory/search/core.py:11-96, sampling.py:9-31.
    """

    horizon: int = 15
    """Transitions planned."""
    beam_width: int = 128
    """Beams kept after each planned transition."""
    n_expand: int = 2
    """Children sampled per beam."""
    discount: float | None = None
    """Discount of the score; None takes the checkpoint's, and 0.99 where there is none."""
    max_context_transitions: int | None = 5
    """The model sees at most this many transitions, less one token; None: its whole window."""
    k_obs: int | None = 1
    """top_k of observation tokens; None keeps all."""
    k_act: int | None = None
    """top_k of action tokens; None keeps all."""
    k_rew: int | None = 1
    """top_k of reward and value tokens; None keeps all."""
    cdf_obs: float | None = None
    """Mass removed from the bottom of an observation token's distribution."""
    cdf_act: float | None = 0.6
    """Mass removed from the bottom of an action token's distribution."""
    cdf_rew: float | None = None
    """Mass removed from the bottom of a reward or value token's distribution."""
    estimate: Literal["mean"] | float = "mean"
    """Reward and value of a distribution: its mean, or this percentile in (0, 1)."""
    temperature: float = 1.0
    """Divides the logits before everything else."""
    overflow: Overflow = "crop"
    """"crop" drops whole transitions from the left, as the original; "grow" never drops one."""
    dtype: Precision = "float32"
    """Arithmetic of the model. float32 is exact; bfloat16 halves the memory of keys and values, and
    on a processor is faster with AMX, AVX-512's float16 or AMD's AVX-512."""

    def __post_init__(self) -> None:
        for name in ("horizon", "beam_width", "n_expand"):
            require_int(name, getattr(self, name), 1, MAX_PLAN_SIZE)
        if self.discount is not None:
            require_number("discount", self.discount, 0.0, 1.0)
        for name in ("max_context_transitions", "k_obs", "k_act", "k_rew"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), 1)
        for name in ("cdf_obs", "cdf_act", "cdf_rew"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), 0.0, 1.0)
        require_number("temperature", self.temperature, *TEMPERATURES)
        if self.estimate != "mean":
            is_number = isinstance(self.estimate, numbers.Real)
            inside = is_number and 0.0 < float(self.estimate) < 1.0
            require(inside, "estimate", '"mean" or a percentile in (0, 1)', self.estimate)
        require_choice("overflow", self.overflow, ("crop", "grow"))
        require_choice("dtype", self.dtype, ("float32", "bfloat16"))
        _make_plain(self)

    @property
    def num_rows(self) -> int:
        """Candidates of one planned step."""
        return self.beam_width * self.n_expand

    def num_draws(self, observation_dim: int, action_dim: int) -> int:
        """Tokens sampled per row in one plan (design: every sampled token draws)."""
        return self.horizon * (action_dim + 2) + (self.horizon - 1) * observation_dim

    def with_discount(self, discount: float) -> PlanConfig:
        """Itself with `discount` filled in where it was None."""
        return self if self.discount is not None else dataclasses.replace(self, discount=discount)


Config = TypeVar("Config", bound=ModelConfig | TrainConfig | PlanConfig)


def config_to_dict(config: ModelConfig | TrainConfig | PlanConfig) -> dict[str, Any]:
    """The fields of `config`, ready for JSON."""
    return dataclasses.asdict(config)


def _make_plain(config: ModelConfig | TrainConfig | PlanConfig) -> None:
    """Make numpy's numbers Python's: torch and JSON take no others everywhere."""
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, _plain(getattr(config, field.name)))


def _plain(value: Any) -> Any:
    """Without numpy's numbers, in a tuple neither."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") else value


def config_from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
    """The inverse of `config_to_dict`.

    Raises:
        ValueError: an unknown or missing key, or a value that `cls` refuses.
    """
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(known))
    require(not unknown, cls.__name__, f"keys among {sorted(known)}", unknown)
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    missing = sorted(required - set(values))
    require(not missing, cls.__name__, f"keys {sorted(required)}", f"none for {missing}")
    # JSON has no tuples; a frozen config holds no lists.
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return cls(**fields)
