"""transformers' TrajectoryTransformerModel, with the planner that it never had.

    from tt_fast.compat.huggingface import TrajectoryTransformerModel
    model = TrajectoryTransformerModel.from_pretrained("CarlCochet/trajectory-transformer-...")

Source: transformers 4.46.3, models/deprecated/trajectory_transformer (modeling_*.py, cited below
by lines, and configuration_*.py). Logits, loss, hidden states and attentions are its uncached
ones. Its cache is not reproduced: it counts positions, embeddings and heads from 0 again and shows
value tokens, so its logits are wrong after the first pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F

from tt_fast.checkpoint import Checkpoint
from tt_fast.config import ModelConfig, PlanConfig
from tt_fast.discretizer import Discretizer
from tt_fast.formats import find_format, huggingface, new_model, read_json
from tt_fast.formats.jannerm import model_config
from tt_fast.model import (
    Attention,
    DimensionHead,
    TrajectoryTransformer,
    attention_mask,
    is_over,
    model_over,
)
from tt_fast.planning.base import BeamPlan
from tt_fast.planning.planner import Planner
from tt_fast.planning.search import beam_plan
from tt_fast.validate import refuse, require


@dataclass
class TrajectoryTransformerConfig:
    """Their config: names and defaults are theirs (configuration_*.py:94-141).

    What no computation of theirs looks at is kept for the sake of code that reads it.
    """

    vocab_size: int = 100
    action_weight: float = 5
    reward_weight: float = 1
    value_weight: float = 1
    block_size: int = 249
    action_dim: int = 6
    observation_dim: int = 17
    transition_dim: int = 25
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    learning_rate: float = 0.0006
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    kaiming_initializer_range: float = 1
    use_cache: bool = True
    pad_token_id: int = 1
    bos_token_id: int = 50256
    eos_token_id: int = 50256
    output_attentions: bool = False
    output_hidden_states: bool = False

    model_type = huggingface.MODEL_TYPE

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrajectoryTransformerConfig:
        """From the values of a config.json; names that it does not know are left out."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})

    def to_dict(self) -> dict[str, Any]:
        """All of it by name."""
        return {"model_type": self.model_type, **dataclasses.asdict(self)}

    @property
    def hidden_size(self) -> int:
        """n_embd."""
        return self.n_embd

    @property
    def num_attention_heads(self) -> int:
        """n_head."""
        return self.n_head

    @property
    def num_hidden_layers(self) -> int:
        """n_layer."""
        return self.n_layer


@dataclass
class TrajectoryTransformerOutput:
    """What `forward` returns with return_dict=True; B batch, T tokens, E n_embd.

    As with transformers' outputs, a name or an index that skips what is None finds a part.
    """

    loss: Tensor | None = None
    """Scalar, nats"""
    logits: Tensor | None = None
    """(B, T, vocab_size + 1)"""
    past_key_values: None = None
    hidden_states: tuple[Tensor, ...] | None = None
    """n_layer + 1 tensors (B, T, E): the embedding, then each block's output"""
    attentions: tuple[Tensor, ...] | None = None
    """n_layer tensors (B, n_head, T, T)"""

    def to_tuple(self) -> tuple[Any, ...]:
        """The parts that are not None."""
        return tuple(getattr(self, name) for name in self.keys())

    def keys(self) -> list[str]:
        """Names of the parts that are not None."""
        names = [field.name for field in dataclasses.fields(self)]
        return [name for name in names if getattr(self, name) is not None]

    def __getitem__(self, key: str | int | slice) -> Any:
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self.keys():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())


class _Block(nn.Module):
    """A block of ours by their names (modeling_*.py:323-365)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(config)
        self.l1, self.act = nn.Linear(width, 4 * width), nn.GELU()
        self.l2, self.drop = nn.Linear(4 * width, width), nn.Dropout(config.residual_dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # x: (B, T, E), mask: (T, T)
        x = x + self.attn(self.ln1(x), mask)
        y: Tensor = x + self.drop(self.l2(self.act(self.l1(self.ln2(x)))))
        return y


class TrajectoryTransformerModel(nn.Module):
    """The model by their names and their `forward`, with a planner.

    Its parameters have their names, so their state_dicts load.

    Args:
        config: ours above, or any object with its attributes, transformers' own too.

    Raises:
        ValueError: sizes that no such model has.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        values = {f.name: getattr(config, f.name) for f in _FIELDS if hasattr(config, f.name)}
        self.config = config
        self._sizes = sizes = model_config(values, "config", goal_conditioned=False)
        width, vocab_size = sizes.embed_dim, sizes.vocab_size
        self.tok_emb = nn.Embedding(vocab_size * sizes.transition_dim + 1, width)
        self.pos_emb = nn.Parameter(torch.zeros(1, sizes.block_size, width))
        self.drop = nn.Dropout(sizes.embed_dropout)
        self.blocks = nn.ModuleList(_Block(sizes) for _ in range(sizes.num_layers))
        self.ln_f = nn.LayerNorm(width)
        self.head = DimensionHead(sizes.transition_dim, width, vocab_size + 1)
        self.register_buffer("_mask", attention_mask(sizes), persistent=False)
        self._mask: Tensor
        self._shared: list[TrajectoryTransformer] = []  # a list hides it from state_dict
        self.load_state_dict(_their_names(TrajectoryTransformer(sizes)))  # initial weights
        self.discretizer: Discretizer | None = None
        """What `from_pretrained` found beside the weights: their format has none"""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
    ) -> TrajectoryTransformerModel:
        """A trained model, in eval mode, on the CPU.

        Args:
            name_or_path: a folder, theirs or any that `Checkpoint.load` reads, or else a name on
                the hub, which needs `tt_fast[hub]`; only config.json and the weights are fetched,
                model.safetensors if there is one.
            revision, cache_dir, token: of the hub, see huggingface_hub.snapshot_download.

        Raises:
            FileNotFoundError: a folder without a file that it needs.
            ImportError: a name on the hub without huggingface_hub.
            ValueError: damaged, hostile, or its files do not belong together; nothing of it was
                run.
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            folder = _download(str(name_or_path), revision, cache_dir, token)
        checkpoint = Checkpoint.load(folder)
        values = huggingface.config_values(checkpoint.model.config)
        if find_format(folder) == huggingface.NAME:
            values |= read_json(folder / huggingface.CONFIG)
        with torch.random.fork_rng([]):  # initial weights draw from the global generator
            model = cls(TrajectoryTransformerConfig.from_dict(values))
        model.load_state_dict(_their_names(checkpoint.model))
        model.discretizer = checkpoint.discretizer
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a new folder that transformers reads too, whole or not at all.

        Raises:
            FileExistsError: `folder` exists and is not empty.
        """
        self.to_checkpoint().save_foreign(folder, huggingface.NAME)

    def get_block_size(self) -> int:
        """Longest token sequence the model takes."""
        return self._sizes.block_size

    def forward(
        self,
        trajectories: Tensor,
        past_key_values: Any = None,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TrajectoryTransformerOutput | tuple[Any, ...]:
        """Logits, and the loss if there are targets (modeling_*.py:455-602).

        Args:
            trajectories: (B, T) integers in [0, vocab_size], the first one being dimension 0 of a
                transition; T at most block_size.
            past_key_values: None; their cache gives wrong logits, so there is none.
            targets: (B, T) integers in [0, vocab_size].
            attention_mask: (B, T), with targets and needed with them: zero where a token does not
                count in the loss. It masks no attention, there neither.
            use_cache: None or False. None means False, whatever the config says, as there.
            output_attentions, output_hidden_states: return these too; None takes the config's.
                Attentions are those before dropout.
            return_dict: True for a `TrajectoryTransformerOutput`; None and False for the tuple of
                its parts that are not None, whatever the config says, as there.

        Raises:
            ValueError: wrong shape, type or range, a cache is asked for, targets without a mask.
        """
        no_cache = "None: their cache gives wrong logits; to generate, use `plan` or `planner`"
        require(past_key_values is None, "past_key_values", no_cache, type(past_key_values))
        require(not use_cache, "use_cache", f"False or {no_cache}", use_cache)
        if output_attentions is None:
            output_attentions = bool(getattr(self.config, "output_attentions", False))
        if output_hidden_states is None:
            output_hidden_states = bool(getattr(self.config, "output_hidden_states", False))
        ours = self.to_tt_fast()
        x = self._embed(ours, trajectories)
        mask = self._mask[: x.shape[1], : x.shape[1]]
        states, maps = [x], []
        for block in self.blocks:
            assert isinstance(block, _Block)
            if output_attentions:
                maps.append(block.attn.weights(block.ln1(x), mask))
            x = block(x, mask)
            states.append(x)
        logits = ours._logits(ours.ln_f(x))
        loss = None if targets is None else _loss(ours, logits, targets, attention_mask)
        output = TrajectoryTransformerOutput(
            loss,
            logits,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(maps) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    def plan(
        self,
        contexts: ArrayLike | Sequence[ArrayLike],
        discretizer: Discretizer,
        plan_config: PlanConfig | None = None,
        **kwargs: Any,
    ) -> BeamPlan:
        """`tt_fast.beam_plan` with this model; arguments, result and errors are its."""
        return beam_plan(self.to_tt_fast(), discretizer, contexts, plan_config, **kwargs)

    def planner(
        self, discretizer: Discretizer, plan_config: PlanConfig | None = None, **kwargs: Any
    ) -> Planner:
        """A `tt_fast.Planner` with this model; arguments and errors are its."""
        return Planner(Checkpoint(self.to_tt_fast(), discretizer), plan_config, **kwargs)

    def to_tt_fast(self) -> TrajectoryTransformer:
        """A `TrajectoryTransformer` over this model's own parameters, not a copy of them."""
        theirs = {huggingface.our_name(name): p for name, p in self.named_parameters()}
        if not (self._shared and is_over(self._shared[0], theirs)):
            self._shared = [model_over(self._sizes, theirs)]
        return self._shared[0].train(self.training)

    def to_checkpoint(self) -> Checkpoint:
        """A checkpoint of ours: a copy of the weights, on the CPU, and the discretizer if any."""
        weights = {k: v.detach().float().cpu() for k, v in self.to_tt_fast().state_dict().items()}
        return Checkpoint(new_model(self._sizes, weights), self.discretizer)

    def _embed(self, ours: TrajectoryTransformer, tokens: Tensor) -> Tensor:
        """(B, T, E)."""
        ours._check_tokens("trajectories", tokens)
        longest = self._sizes.block_size
        fits = tokens.ndim == 2 and 1 <= tokens.shape[1] <= longest
        require(fits, "trajectories", f"shape (B, T), T <= {longest}", tuple(tokens.shape))
        x: Tensor = self.tok_emb(ours._offset(tokens)) + self.pos_emb[:, : tokens.shape[1]]
        dropped: Tensor = self.drop(x)
        return dropped


_FIELDS = dataclasses.fields(TrajectoryTransformerConfig)


def _loss(
    ours: TrajectoryTransformer, logits: Tensor, targets: Tensor, mask: Tensor | None
) -> Tensor:
    """Weighted, masked cross-entropy averaged over all B * T tokens (modeling_*.py:566-587)."""
    if mask is None:
        refuse("attention_mask", "the loss mask (B, T) with targets", None)
    ours._check_tokens("targets", targets)
    shape = tuple(logits.shape[:2])
    require(tuple(targets.shape) == shape, "targets", f"shape {shape}", tuple(targets.shape))
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return ours.weighted_loss(losses.view(shape), mask)


def _their_names(model: TrajectoryTransformer) -> dict[str, Tensor]:
    return {huggingface.their_name(name): w for name, w in model.state_dict().items()}


def _download(
    name: str, revision: str | None, cache_dir: str | Path | None, token: str | bool | None
) -> Path:
    """A folder with a model of the hub's: its config, and weights of one kind."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: expected a folder or a name on the hub, got neither")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f'name_or_path: {name!r} is no folder; to fetch it from the hub, install "tt_fast[hub]"'
        ) from error
    options: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    folder = Path()
    for weights in (huggingface.SAFETENSORS, huggingface.BIN):
        wanted = [huggingface.CONFIG, weights]
        folder = Path(snapshot_download(name, allow_patterns=wanted, **options))
        if (folder / weights).is_file():
            break
    return folder
