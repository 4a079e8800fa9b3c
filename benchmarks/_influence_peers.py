"""One task of a torch library in a process of its own: `... TASK REPEATS`; see `_influence_ours`."""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._measure import cpu_seconds, peak_mib, pin, resident_mib

FOLDER = Path(".bench/influence")
VOCAB, LENGTH = 256, 64
Work = Callable[[], Any]


def windows(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same rows that `_influence_setting.windows` gives."""
    rng = np.random.default_rng(seed)
    drawn = torch.tensor(rng.integers(0, VOCAB, (count, LENGTH + 1), dtype=np.int32)).long()
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def model_of(name: str) -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            path = FOLDER / name
            self.inner = LlamaForCausalLM.from_pretrained(path, attn_implementation="eager")

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.inner(tokens, use_cache=False).logits

    return Logits().eval()


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_hvp() -> dict[str, Work]:
    """Two reverse passes, by hand."""
    model, (tokens, targets) = model_of("small"), windows(8, 0)
    params = list(model.parameters())
    vectors = [torch.randn_like(p) for p in params]

    def run() -> None:
        loss = cross_entropy(model(tokens), targets)
        slopes = torch.autograd.grad(loss, params, create_graph=True)
        torch.autograd.grad(slopes, params, grad_outputs=vectors)

    return {"product": run}


def dattri_hvp(kind: str, mode: str) -> dict[str, Work]:
    from dattri.func.hessian import hvp, hvp_at_x
    from dattri.func.utils import flatten_func, flatten_params

    model, (tokens, targets) = model_of("small"), windows(8, 0)
    params = {name: p.detach() for name, p in model.named_parameters()}

    @flatten_func(model)
    def loss(params: Any) -> torch.Tensor:
        return cross_entropy(torch.func.functional_call(model, params, (tokens,)), targets)

    flat = flatten_params(params)
    vector = torch.randn_like(flat)
    if kind == "at x":
        at_x = hvp_at_x(loss, (flat,), mode=mode)
        return {"product": lambda: at_x(vector)}
    product = hvp(loss, mode=mode)
    return {"product": lambda: product((flat,), vector)}


def curvlinops(operator: str) -> dict[str, Work]:
    import curvlinops

    model, rows = model_of("small"), windows(8, 0)
    params = {n: p for n, p in model.named_parameters()}
    tokens, targets = rows

    class Flat(torch.nn.Module):  # its losses take [N, V] and [N]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.model(tokens).flatten(0, 1)

    flat = Flat()
    named = {f"model.{n}": p for n, p in params.items()}
    make = getattr(curvlinops, operator)
    arguments = [flat, torch.nn.CrossEntropyLoss()]
    try:
        matrix = make(*arguments, named, [(tokens, targets.flatten())], check_deterministic=False)
    except (TypeError, AttributeError):  # older releases take a list
        matrix = make(
            *arguments, list(named.values()), [(tokens, targets.flatten())],
            check_deterministic=False,
        )
    vectors = [torch.randn_like(p) for p in named.values()]
    return {"product": lambda: matrix @ vectors}


def kronfluence() -> dict[str, Work]:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            tokens, targets = batch
            logits = model(tokens).flatten(0, 1)
            targets = targets.flatten()
            if sample:
                with torch.no_grad():
                    targets = torch.multinomial(logits.softmax(-1), 1).flatten()
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

    bare, task = model_of("wide"), Language()
    # The head left out, as it is with us.
    linear = [
        n for n, m in bare.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n
    ]
    task.get_influence_tracked_modules = lambda: linear  # type: ignore[method-assign]
    train = torch.utils.data.TensorDataset(*windows(256, 0))
    queries = torch.utils.data.TensorDataset(*windows(16, 1))
    tokens, targets = windows(256, 0)
    plain = model_of("wide")

    def one_pass() -> None:
        for i in range(0, 256, 32):
            loss = cross_entropy(plain(tokens[i : i + 32]), targets[i : i + 32])
            torch.autograd.grad(loss, list(plain.parameters()))

    model = prepare_model(bare, task)
    folder = tempfile.mkdtemp()
    analyzer = Analyzer("bench", model, task, output_dir=folder, cpu=True, disable_tqdm=True)

    def fit() -> None:
        analyzer.fit_all_factors(
            "f",
            train,
            per_device_batch_size=32,
            factor_args=FactorArguments(strategy="ekfac"),
            overwrite_output_dir=True,
        )

    def scores() -> None:
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            queries,
            train,
            per_device_query_batch_size=16,
            per_device_train_batch_size=32,
            score_args=ScoreArguments(damping_factor=None),
            overwrite_output_dir=True,
        )

    return {"pass": one_pass, "factors": fit, "scores": scores}


def datainf_loop() -> dict[str, Work]:
    """The reference formula, one document and one tensor after another (Kwon et al. 2023)."""
    sets = []
    for name in ("train", "queries"):
        with np.load(FOLDER / f"datainf-{name}.npz") as file:
            arrays = {path: torch.tensor(file[path]) for path in file.files}
        count = len(next(iter(arrays.values())))
        sets.append([{p: x[i] for p, x in arrays.items()} for i in range(count)])
    train, queries = sets

    def run() -> torch.Tensor:
        levels = {}
        for path in train[0]:
            total = torch.zeros(len(train))
            for i, g in enumerate(train):
                total[i] = torch.mean(g[path] ** 2)
            levels[path] = torch.mean(total) / 10
        scores = torch.zeros(len(queries), len(train))
        for k, v in enumerate(queries):
            moved = {}
            for path, level in levels.items():
                total = torch.zeros_like(v[path])
                for g in train:
                    share = torch.sum(v[path] * g[path]) / (level + torch.sum(g[path] ** 2))
                    total += (v[path] - share * g[path]) / (len(train) * level)
                moved[path] = total
            for i, g in enumerate(train):
                scores[k, i] = -sum(torch.sum(moved[path] * g[path]) for path in moved)
        return scores

    def checked() -> None:
        got = np.load(FOLDER / "datainf-scores.npy")
        want = run().numpy()
        np.save(FOLDER / "datainf-difference.npy", np.linalg.norm(got - want) / np.linalg.norm(want))

    checked()
    return {"scores": run}


TASKS: dict[str, Callable[[], dict[str, Work]]] = {
    "torch double backward": torch_hvp,
    "dattri hvp, rev-rev": lambda: dattri_hvp("hvp", "rev-rev"),
    "dattri hvp, rev-fwd": lambda: dattri_hvp("hvp", "rev-fwd"),
    "dattri hvp_at_x, rev-rev": lambda: dattri_hvp("at x", "rev-rev"),
    "curvlinops Hessian": lambda: curvlinops("HessianLinearOperator"),
    "curvlinops GGN": lambda: curvlinops("GGNLinearOperator"),
    "kronfluence": kronfluence,
    "literal loop": datainf_loop,
}


def main(task: str, repeats: int) -> None:
    pin()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    before, out = resident_mib(), {}
    for name, work in TASKS[task]().items():
        work()
        times = []
        for _ in range(repeats):
            start = cpu_seconds()
            work()
            times.append(cpu_seconds() - start)
        out[name] = float(np.median(times))
    print(json.dumps(out | {"mib": peak_mib() - before}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
