"""One torch library on one setting, in a process of its own: `... SETTING METHOD SCORES`.

Prints what `_attribution_ours` prints, and writes scores (K, N) of which positive is harmful.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._measure import cpu_seconds, peak_mib, pin, resident_mib

FOLDER = Path(".bench/attribution")


def digits_model() -> torch.nn.Module:
    layers: list[torch.nn.Module] = []
    with np.load(FOLDER / "digits.npz") as file:
        for i in range(3):
            linear = torch.nn.Linear(*file[f"{i}/kernel"].shape)
            linear.weight.data = torch.tensor(file[f"{i}/kernel"].T.copy())
            linear.bias.data = torch.tensor(file[f"{i}/bias"])
            layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def text_model(folder: str = "text-hf") -> torch.nn.Module:
    from transformers import LlamaForCausalLM

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            path = FOLDER / folder
            self.inner = LlamaForCausalLM.from_pretrained(path, attn_implementation="eager")

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.inner(tokens, use_cache=False).logits

    return Logits()


def data(setting: str) -> tuple[Any, Any]:
    with np.load(FOLDER / f"{setting}-data.npz") as file:
        inputs, targets = torch.tensor(file["inputs"]), torch.tensor(file["targets"]).long()
        N = int(file["train"])
    if inputs.dtype == torch.int32:
        inputs = inputs.long()
    pick = torch.utils.data.TensorDataset
    return pick(inputs[:N], targets[:N]), pick(inputs[N:], targets[N:])


def kronfluence(setting: str, damping: float | None) -> Any:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            inputs, targets = batch
            logits = model(inputs)
            logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
            if sample:
                with torch.no_grad():
                    targets = torch.multinomial(logits.softmax(-1), 1).flatten()
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return self.compute_train_loss(batch, model)

    train, queries = data(setting)
    model, task = digits_model() if setting == "digits" else text_model(), Classification()
    linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    task.get_influence_tracked_modules = lambda: linear  # type: ignore[method-assign]
    model = prepare_model(model, task)

    def run() -> np.ndarray:
        folder = tempfile.mkdtemp()
        analyzer = Analyzer("bench", model, task, output_dir=folder, cpu=True, disable_tqdm=True)
        size = 400 if setting == "digits" else 32
        analyzer.fit_all_factors(
            "f", train, per_device_batch_size=size, factor_args=FactorArguments(strategy="ekfac")
        )
        analyzer.compute_pairwise_scores(
            "s",
            "f",
            queries,
            train,
            per_device_query_batch_size=64,
            per_device_train_batch_size=size,
            score_args=ScoreArguments(damping_factor=damping),
        )
        found = analyzer.load_pairwise_scores("s")["all_modules"].numpy()
        shutil.rmtree(folder)
        return -found  # its positive is helpful

    return run


def dattri_cg(setting: str) -> Any:
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask

    train, queries = data(setting)
    model = digits_model()

    def loss(params: Any, batch: Any) -> torch.Tensor:
        inputs, targets = batch
        logits = torch.func.functional_call(model, params, inputs)
        return torch.nn.functional.cross_entropy(logits, targets)

    def run() -> np.ndarray:
        task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
        attributor = IFAttributorCG(task, max_iter=20, regularization=1e-2)
        attributor.cache(torch.utils.data.DataLoader(train, batch_size=len(train)))
        scores = attributor.attribute(
            torch.utils.data.DataLoader(train, batch_size=len(train)),
            torch.utils.data.DataLoader(queries, batch_size=len(queries)),
        )
        return -scores.detach().T.numpy()

    return run


def trak(setting: str) -> Any:
    from trak import TRAKer

    train, queries = data(setting)
    model = digits_model().eval()

    def run() -> np.ndarray:
        folder = tempfile.mkdtemp()
        traker = TRAKer(
            model,
            "image_classification",
            len(train),
            save_dir=folder,
            device="cpu",
            proj_dim=512,
            use_half_precision=False,
            load_from_save_dir=True,
            logging_level=50,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in torch.utils.data.DataLoader(train, batch_size=400):
            traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        traker.start_scoring_checkpoint("q", model.state_dict(), 0, num_targets=len(queries))
        for batch in torch.utils.data.DataLoader(queries, batch_size=200):
            traker.score(batch, num_samples=len(batch[0]))
        scores = np.asarray(traker.finalize_scores("q"), np.float32)
        shutil.rmtree(folder)
        return -scores.T

    return run


METHODS = {
    "kronfluence EK-FAC, damping 1e-8": (lambda s: kronfluence(s, 1e-8), "kronfluence"),
    "kronfluence EK-FAC, damping None": (lambda s: kronfluence(s, None), "kronfluence"),
    "dattri CG, 20 steps": (dattri_cg, "dattri"),
    "traker, k=512": (trak, "traker"),
}


def main(setting: str, method: str, out: str) -> None:
    pin()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    run = METHODS[method][0](setting)
    before, start = resident_mib(), cpu_seconds()
    scores = run()
    used = cpu_seconds() - start
    np.save(out, scores)
    print(json.dumps({"cpu": used, "mib": peak_mib() - before}))


if __name__ == "__main__":
    main(*sys.argv[1:])
