"""The processor's training pass: its losses and gradients are the model's."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tiny import tiny_model
from torch import Tensor

from tt_fast.model import TrajectoryTransformer
from tt_fast.training import cpu_ops
from tt_fast.training.cpu_ops import DropoutMasks, attention, linear
from tt_fast.training.passes import Batch, ParallelPasses, even_passes, pass_losses

NO_DROPOUT = {"embed_dropout": 0.0, "residual_dropout": 0.0, "attention_dropout": 0.0}


def batch(model: TrajectoryTransformer) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Tokens, targets, mask and goal; stop tokens among them."""
    generator = torch.Generator().manual_seed(0)
    config = model.config
    tokens = torch.randint(0, 9, (5, config.block_size + 1), generator=generator)
    tokens[0, -9:] = config.vocab_size
    mask = torch.ones(5, config.block_size, dtype=torch.bool)
    mask[1, -4:] = False
    goal = torch.randint(0, 8, (5, config.observation_dim), generator=generator)
    return tokens[:, :-1], tokens[:, 1:], mask, goal if config.goal_conditioned else None


def gradients(model: TrajectoryTransformer, losses: Tensor, mask: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.weighted_loss(losses, mask).backward()
    return {name: p.grad.double().clone() for name, p in model.named_parameters()}


def assert_as_exact(fast: Tensor, plain: Tensor, truth: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same type, against float64, and a few
    roundings of the largest number, as some of plain PyTorch's errors are small by chance."""
    error, allowed = ((x.detach().double() - truth).abs().max() for x in (fast, plain))
    tiny = 4.0 * torch.finfo(torch.float32).eps * float(truth.abs().max())
    assert float(error) <= 2.0 * float(allowed) + tiny


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("goal_conditioned", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_losses_and_gradients_are_the_models(
    monkeypatch: pytest.MonkeyPatch, bfloat16: bool, goal_conditioned: bool, onednn: bool
) -> None:
    if onednn and not cpu_ops._has_onednn():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu_ops, "_ONEDNN", onednn)
    model = tiny_model(goal_conditioned=goal_conditioned, **NO_DROPOUT).train()
    exact = copy.deepcopy(model).double()
    tokens, targets, mask, goal = batch(model)
    truth = exact.token_losses(tokens, targets, goal)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        plain = model.token_losses(tokens, targets, goal)
        fast = pass_losses(model, tokens, targets, goal, None)
    assert_as_exact(fast, plain, truth.detach())
    found = gradients(model, fast, mask)
    wanted, exactly = gradients(model, plain, mask), gradients(exact, truth, mask)
    for name in exactly:
        assert_as_exact(found[name], wanted[name], exactly[name])


class OneMask:
    """Masks from torch, remembered, so that a plain model can use the same ones."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(1)

    def keep(self, shape: tuple[int, ...], probability: float) -> Tensor:
        uniform = torch.rand(shape, generator=self.generator)
        self.drawn.append((uniform >= probability).to(torch.uint8))
        return self.drawn[-1]


def plain_losses(model: TrajectoryTransformer, masks: list[Tensor], data: tuple) -> Tensor:
    """Dropout written out, operation by operation, with given masks in order."""
    tokens, targets, _, goal = data
    config, drawn = model.config, iter(masks)

    def drop(x: Tensor, probability: float) -> Tensor:
        return x * next(drawn).to(x.dtype) / (1.0 - probability)

    x = model._embedding(tokens, goal)
    goal_len = config.goal_len
    x = torch.cat([x[:, :goal_len], drop(x[:, goal_len:], config.embed_dropout)], dim=1)
    hidden = ~model._mask[: x.shape[1], : x.shape[1]]
    for block in model.blocks:
        weights = block.attn.weights(block.ln1(x), ~hidden)
        shape = weights.shape
        weights = drop(weights.flatten(0, 1), config.attention_dropout).view(shape)
        y = (weights @ block.attn._heads(block.attn.value(block.ln1(x)))).transpose(1, 2).flatten(2)
        x = x + drop(block.attn.proj(y), config.residual_dropout)
        h = torch.nn.functional.gelu(block.mlp[0](block.ln2(x)))
        x = x + drop(block.mlp[2](h), config.residual_dropout)
    logits = model._logits(model.ln_f(x)[:, goal_len:])
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    return losses.view(targets.shape)


@pytest.mark.parametrize("goal_conditioned", [False, True])
def test_dropout_is_where_the_model_has_it(goal_conditioned: bool) -> None:
    """The same masks, applied in plain operations, give the same losses and gradients."""
    model = tiny_model(goal_conditioned=goal_conditioned, attention_dropout=0.3).train().double()
    data, masks = batch(model), OneMask()
    fast = pass_losses(model, data[0], data[1], data[3], masks)  # type: ignore[arg-type]
    assert len(masks.drawn) == 1 + 3 * model.config.num_layers
    plain = plain_losses(model, masks.drawn, data)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)
    found, wanted = (gradients(model, losses, data[2]) for losses in (fast, plain))
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-12)


def test_attention_passes_a_gradient_check() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    hidden = ~torch.ones(4, 4, dtype=torch.bool).tril()
    hidden[3, 1] = True
    keep = (torch.rand(2, 4, 4, generator=generator) > 0.4).to(torch.uint8)
    for mask in (None, keep):
        assert torch.autograd.gradcheck(
            lambda *x, mask=mask: attention(*x, hidden, mask, 0.4), (q, k, v)
        )


@pytest.mark.skipif(not cpu_ops._has_onednn(), reason="this torch has no oneDNN")
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (159, 128, 384), (97, 512, 128)])
def test_products_of_onednn_are_products(shape: tuple[int, int, int]) -> None:
    rows, width, out = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, rows, width, generator=generator)
    weight, bias = torch.randn(out, width, generator=generator), torch.randn(out)
    upstream = torch.randn(2, rows, out, generator=generator)
    results = []
    for function, dtype in (
        (linear, torch.float32),
        (torch.nn.functional.linear, torch.float32),
        (torch.nn.functional.linear, torch.float64),
    ):
        arguments = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
        y = function(*arguments)
        y.backward(upstream.to(dtype))
        results.append([y.detach(), *(t.grad for t in arguments)])
    for fast, plain, truth in zip(*results, strict=True):
        assert_as_exact(fast, plain, truth)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_masks_drop_their_share(probability: float) -> None:
    keep = DropoutMasks(0, 1).keep((400, 500), probability)
    assert keep.dtype == torch.uint8
    assert set(np.unique(keep)) <= {0, 1}
    deviation = abs(float(keep.double().mean()) - (1.0 - probability))
    assert deviation <= 5.0 * np.sqrt(probability * (1.0 - probability) / keep.numel()) + 2.0**-16
    if 0.0 < probability < 1.0:  # neighbours, rows and columns, know nothing of each other
        centred = keep.double() - keep.double().mean()
        for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
            assert abs(float((a * b).mean() / centred.var())) < 5.0 / np.sqrt(keep.numel())


def test_masks_have_addresses() -> None:
    def draw(*address: int) -> list[Tensor]:
        masks = DropoutMasks(*address)
        return [masks.keep((3, 33), 0.5), masks.keep((99,), 0.5)]

    first, again, other = draw(0, 7, 1), draw(0, 7, 1), draw(0, 7, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0].flatten(), first[1])


# --- passes side by side --------------------------------------------------------------------------


def split(data: tuple, sizes: list[int]) -> list[Batch]:
    parts = [x.split(sizes) if x is not None else [None] * len(sizes) for x in data]
    return [Batch(*each) for each in zip(*parts, strict=True)]


def backward(passes: ParallelPasses, batches: list[Batch]) -> list[Tensor]:
    """All batches of a step, in float32."""
    addresses = [(3, 1, pass_idx) for pass_idx in range(len(batches))]
    num_windows = sum(len(each.inputs) for each in batches)
    return passes.backward(batches, addresses=addresses, num_windows=num_windows, bfloat16=False)


def step_gradients(passes: ParallelPasses, batches: list[Batch]) -> dict[str, Tensor]:
    backward(passes, batches)
    return {name: p.grad.clone() for name, p in passes.model.named_parameters()}


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [[5], [2, 2, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("goal_conditioned", [False, True])
def test_passes_add_up_to_the_whole_batch(
    num_threads: int, sizes: list[int], goal_conditioned: bool
) -> None:
    model = tiny_model(goal_conditioned=goal_conditioned, **NO_DROPOUT).train()
    data = batch(model)
    passes = ParallelPasses(model, num_threads)
    losses = backward(passes, split(data, sizes))
    found = {name: p.grad.double().clone() for name, p in model.named_parameters()}
    passes.close()
    plain = model.token_losses(data[0], data[1], data[3])
    exact = copy.deepcopy(model).double()
    truth = exact.token_losses(data[0], data[1], data[3])
    assert [len(each) for each in losses] == sizes
    assert_as_exact(torch.cat(losses), plain, truth.detach())
    wanted, exactly = gradients(model, plain, data[2]), gradients(exact, truth, data[2])
    for name in exactly:
        assert_as_exact(found[name], wanted[name], exactly[name])


def test_a_step_is_the_same_every_time_and_sees_new_weights() -> None:
    model = tiny_model(attention_dropout=0.3).train()
    batches = split(batch(model), [2, 2, 1])
    passes = ParallelPasses(model, 2)
    first, again = (step_gradients(passes, batches) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)  # as an optimiser does, in place
    changed = step_gradients(passes, batches)
    passes.close()
    fresh = ParallelPasses(model, 2)
    wanted = step_gradients(fresh, batches)
    fresh.close()
    assert all(torch.equal(changed[name], wanted[name]) for name in wanted)
    assert not torch.equal(changed["pos_emb"], first["pos_emb"])


def test_dropout_of_a_pass_does_not_depend_on_the_threads() -> None:
    model = tiny_model(attention_dropout=0.3).train()
    batches = split(batch(model), [2, 2, 1])
    losses = []
    for num_threads in (1, 2, 3):
        passes = ParallelPasses(model, num_threads)
        losses.append(torch.cat(backward(passes, batches)))
        passes.close()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def test_torchs_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = tiny_model().train()
        passes = ParallelPasses(model, 2)
        backward(passes, split(batch(model), [5]))
        passes.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_pass_comes_through() -> None:
    model = tiny_model().train()
    data = batch(model)
    passes = ParallelPasses(model, 2)
    with pytest.raises(ValueError, match="tokens: expected ids"):
        backward(passes, split((data[0] + 100, *data[1:]), [2, 3]))
    passes.close()


@pytest.mark.parametrize(
    ("num_windows", "window_len", "num_threads", "wanted"),
    [
        (256, 159, 1, 26),  # 10 passes of 26 windows
        (256, 159, 2, 26),
        (256, 159, 16, 16),  # a pass a thread
        (256, 159, 4, 22),  # 12 passes: three a thread
        (256, 249, 2, 16),
        (3, 159, 16, 1),
        (8, 27, 2, 4),
        (1, 5000, 4, 1),
    ],
)
def test_threads_have_as_many_passes(
    num_windows: int, window_len: int, num_threads: int, wanted: int
) -> None:
    assert even_passes(num_windows, window_len, num_threads) == wanted
