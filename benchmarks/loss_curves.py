"""The same learning: losses of the original's model beside ours, at equal tokens.

    python benchmarks/loss_curves.py FILE --original PATH --out FOLDER   # an hour or two
    python benchmarks/loss_curves.py --plot FIGURE --out FOLDER          # figure and table of them

PATH is a checkout of jannerm/trajectory-transformer. Every engine sees the same windows in the same
order with the same learning rates; initial weights are the same for a seed, dropout is each
engine's own. "original" is its GPT and its step, in float32; "float32" and "bfloat16" are
`tt_fast.train`. A run writes FOLDER/ENGINE-SEED.csv; runs that are there are not made again.
FOLDER/options.json has what all of them share.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.figure
import numpy as np
import torch
from bench_original import Original
from torch import Tensor
from tqdm.auto import tqdm

import tt_fast
from tt_fast import ModelConfig, OfflineDataset, TrainConfig, TrajectoryTransformer
from tt_fast.config import TOKEN_KINDS
from tt_fast.encoding import tokenize
from tt_fast.files import atomic_write, read_json, to_json, write_text
from tt_fast.training.log import read_metrics
from tt_fast.training.losses import evaluate_losses, model_batch
from tt_fast.training.optimizer import Budget
from tt_fast.validate import require

ENGINES = ("original", "float32", "bfloat16")
COLOURS = {"original": "#1f2328", "float32": "#0072b2", "bfloat16": "#d55e00"}
COLUMNS = ("tokens", *TOKEN_KINDS)
#: Steps whose mean is a row.
LOG_STEPS = 20

Row = dict[str, float]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="?", help="a dataset, as `tt-fast train` takes it")
    parser.add_argument("--original", type=Path, help="a checkout of the original")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--tokens", type=int, default=8_000_000, help="of every run")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--plot", type=Path, help="write this figure, print a table, train nothing")
    args = parser.parse_args()
    if args.plot is not None:
        rows = {path.stem: read_metrics(path) for path in sorted(args.out.glob("*-*.csv"))}
        plot(rows, args.plot)
        print(table(rows))
        return
    if args.file is None or ("original" in args.engines and args.original is None):
        parser.error("expected FILE, and --original PATH for that engine")
    dataset = tt_fast.load_dataset(args.file)
    names = ("tokens", "batch_size", "learning_rate")
    share_options(
        args.out, {"dataset": dataset.name} | {name: getattr(args, name) for name in names}
    )
    for seed, engine in itertools.product(args.seeds, args.engines):
        path = args.out / f"{engine}-{seed}.csv"
        if path.exists():
            print(f"{path}: made before")
            continue
        config = TrainConfig(
            batch_size=args.batch_size, learning_rate=args.learning_rate, max_tokens=args.tokens,
            seed=seed, device="cpu", log_steps=LOG_STEPS,
            precision="bfloat16" if engine == "bfloat16" else "float32",
        )  # fmt: skip
        run = run_original if engine == "original" else run_ours
        write(path, run(dataset, config, args.original))


def share_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Write what all runs of a folder share.

    Raises:
        ValueError: its runs were made with something else.
    """
    path = folder / "options.json"
    before = read_json(path) if path.exists() else options
    require(before == options, "options", f"{before}, those of {folder}", options)
    write_text(path, to_json(options))


def run_ours(dataset: OfflineDataset, config: TrainConfig, _: Path | None) -> list[Row]:
    """Rows of `tt_fast.train`; the last one without dropout."""
    with tempfile.TemporaryDirectory() as folder:
        model = ModelConfig(dataset.observation_dim, dataset.action_dim)
        checkpoint = tt_fast.train(dataset, model, config, folder)
        rows = [
            {"tokens": row["tokens"], **{kind: row[f"loss_{kind}"] for kind in TOKEN_KINDS}}
            for row in read_metrics(Path(folder) / "metrics.csv")
        ]
    return [*rows, {"tokens": rows[-1]["tokens"], **checkpoint.metadata["eval_losses"]}]


def run_original(dataset: OfflineDataset, config: TrainConfig, path: Path) -> list[Row]:
    """Rows of the original's GPT and optimiser, on the batches and rates of `tt_fast.train`."""
    model_config = ModelConfig(dataset.observation_dim, dataset.action_dim)
    _, windows = tokenize(dataset, model_config, config)
    torch.manual_seed(config.seed)  # as train does, just before it makes its model
    model = TrajectoryTransformer(model_config)
    gpt = Original(path).load(model).train()
    optimizer = gpt.configure_optimizers(
        SimpleNamespace(
            weight_decay=config.weight_decay, learning_rate=config.learning_rate, betas=config.betas
        )
    )
    budget = Budget(config, len(windows), windows.window_len)
    tokens, rows, since = 0, [], []
    bar = tqdm(total=config.max_tokens, unit="token", unit_scale=True)
    for ids in batches(len(windows), config):
        for group in optimizer.param_groups:
            group["lr"] = budget.learning_rate(tokens, budget.fraction(tokens, 0, 0.0))
        inputs, targets, mask, _ = model_batch(model, windows, ids)
        logits, loss = gpt(inputs, targets.contiguous(), mask.contiguous())
        gpt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), config.grad_clip)
        optimizer.step()
        count = int((targets != model_config.vocab_size).sum())
        tokens += count
        bar.update(count)
        since.append(losses_by_kind(model, logits.detach(), targets, mask))
        done = tokens >= (config.max_tokens or 0)
        if len(since) == LOG_STEPS or done:
            means = np.mean(since, axis=0)
            rows.append({"tokens": tokens, **dict(zip(TOKEN_KINDS, means, strict=True))})
            since.clear()
        if done:
            break
    bar.close()
    model.load_state_dict(gpt.state_dict())
    return [*rows, {"tokens": tokens, **evaluate_losses(model, windows)}]


def losses_by_kind(
    model: TrajectoryTransformer, logits: Tensor, targets: Tensor, mask: Tensor
) -> list[float]:
    """Unweighted mean loss of each kind of token, as `train` logs it."""
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    by_kind = model.mean_by_kind(losses.view(targets.shape), mask)
    return [float(by_kind[kind]) for kind in TOKEN_KINDS]


def batches(num_windows: int, config: TrainConfig) -> Any:
    """(batch,) window ids, epoch after epoch, in the order of `tt_fast.train`."""
    for epoch in itertools.count():
        order = np.random.default_rng([config.seed, epoch]).permutation(num_windows)
        yield from torch.from_numpy(order).split(config.batch_size)


def write(path: Path, rows: Sequence[Row]) -> None:
    """A run's file, whole."""
    with atomic_write(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if k != "tokens" else int(v) for k, v in row.items()}
                         for row in rows)  # fmt: skip


def plot(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """A panel a kind of token, a line a run."""
    figure = matplotlib.figure.Figure((10.0, 2.9), layout="constrained")
    panels = figure.subplots(1, len(TOKEN_KINDS))
    for axes, kind in zip(panels, TOKEN_KINDS, strict=True):
        for name, rows in runs.items():
            engine, _, seed = name.rpartition("-")
            axes.plot(
                [row["tokens"] / 1e6 for row in rows[:-1]], [row[kind] for row in rows[:-1]],
                color=COLOURS[engine], linewidth=0.9, alpha=0.8,
                label=engine if seed == "0" else None,
            )  # fmt: skip
        axes.set_title(kind, fontsize=9)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("loss (nats per token)", fontsize=8)
    panels[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("tokens trained on (millions)", fontsize=8)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=150)


def table(runs: Mapping[str, Sequence[Row]]) -> str:
    """Losses without dropout after the last step: mean over seeds, and their standard deviation."""
    lines = ["| engine | seeds | " + " | ".join(TOKEN_KINDS) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(TOKEN_KINDS))
    for engine in ENGINES:
        last = [rows[-1] for name, rows in runs.items() if name.startswith(f"{engine}-")]
        if not last:
            continue
        cells = []
        for kind in TOKEN_KINDS:
            values = [row[kind] for row in last]
            spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{spread}")
        lines.append(f"| {engine} | {len(last)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
