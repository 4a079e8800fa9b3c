"""Every layout against one process that knows none: losses and gradient norms over 20 steps.

Two ranks under DDP, FSDP2 and tensor parallelism are in test_train.py, in the ordinary suite.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from dh_torch_bridge.distributed.mesh import SPLIT_BACKWARD  # noqa: E402
from tests.dh_torch_bridge.launch import torchrun  # noqa: E402
from tests.dh_torch_bridge.layouts import (  # noqa: E402
    MAX_NORM,
    VOCABULARY,
    make_batch,
    make_model,
)

HERE = Path(__file__).parent
TOLERANCE = {"float32": 2e-5, "float64": 1e-8, "bfloat16": 5e-4}
Layout = dict[str, Any]


def shares(**sizes: Any) -> Layout:
    return {"strategy": "fsdp2", **sizes}


PIPELINES: dict[str, Layout] = {
    name: shares(pipeline=2, schedule=name)
    for name in ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
}
TWO: dict[str, Layout] = {
    "ddp": {"strategy": "ddp", "replicate": -1},
    "fsdp2": shares(shard=-1),
    "tp": shares(tensor=-1),
    "sp": shares(tensor=2, sequence_parallel=True),
    **PIPELINES,
}
FOUR: dict[str, Layout] = {
    "hsdp": shares(replicate=2, shard=2),
    "fsdp_tp": shares(shard=2, tensor=2),
    "fsdp_sp": shares(shard=2, tensor=2, sequence_parallel=True),
    "replicate_tp": shares(replicate=2, tensor=2),
    **{
        f"{name}_fsdp": {**layout, "shard": 2, "reshard_after_forward": name not in SPLIT_BACKWARD}
        for name, layout in PIPELINES.items()
    },
    "pp_tp": shares(pipeline=2, tensor=2),
    "pp4": shares(pipeline=4, microbatches=8),
}
EIGHT: dict[str, Layout] = {
    **{
        f"{name}_fsdp_tp": {**layout, "shard": 2, "tensor": 2, "reshard_after_forward": False}
        for name, layout in PIPELINES.items()
    },
    "pp_hsdp": shares(pipeline=2, replicate=2, shard=2),
    "pp_fsdp_sp": shares(pipeline=2, shard=2, tensor=2, sequence_parallel=True),
}


def cases_of(layouts: dict[str, Layout]) -> dict[str, dict[str, Any]]:
    """Each layout in three precisions; the embedding tied in one, untied in the others."""
    cases: dict[str, dict[str, Any]] = {}
    for name, layout in layouts.items():
        cases[f"{name}:float32"] = {"layout": layout, "model": {"tied": True}}
        cases[f"{name}:float64"] = {"layout": layout, "dtype": "float64"}
        # Transformers' spread of new weights: a large one would make bfloat16's own noise large.
        cases[f"{name}:bfloat16"] = {
            "layout": layout, "autocast": True, "model": {"initializer_range": 0.02},
        }  # fmt: skip
    return cases


@functools.cache
def alone(case: str, rate: float = 3e-4) -> dict[str, list[float]]:
    """One process, written out: torch's own mean, clipping and AdamW."""
    settings = json.loads(case)
    model = make_model(settings.get("dtype", "float32"), **settings.get("model", {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    losses, norms = [], []
    calls = settings.get("calls", 1)
    for step in range(settings.get("steps", 20)):
        for call in range(calls):
            batch = make_batch(step * calls + call)
            segments = batch["segment_ids"]
            sees = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.get("autocast", False)):
                logits = model(
                    input_ids=batch["input_ids"],
                    position_ids=batch["position_ids"],
                    attention_mask=sees,
                ).logits
            if logits.dtype == torch.bfloat16:
                logits = logits.float()
            loss = torch.nn.functional.cross_entropy(
                logits.reshape(-1, VOCABULARY), batch["shift_labels"].reshape(-1)
            )
            loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"loss": losses, "norm": norms}


def differences(
    cases: dict[str, dict[str, Any]], ranks: int, folder: Path
) -> dict[str, tuple[float, float]]:
    """Largest difference of loss, and of norm over norm, of each case from one process."""
    asked, answered = folder / "cases.json", folder / "answers.json"
    asked.write_text(json.dumps(cases))
    done = torchrun(str(HERE / "layouts.py"), str(asked), str(answered), ranks=ranks, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for name, ours in json.loads(answered.read_text()).items():
        settings = {key: value for key, value in cases[name].items() if key != "layout"}
        theirs = alone(json.dumps(settings))
        loss, norm = (np.subtract(ours[key], theirs[key]) for key in ("loss", "norm"))
        found[name] = (
            float(np.abs(loss).max()),
            float(np.abs(norm / np.asarray(theirs["norm"])).max()),
        )
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "layouts"), [(2, TWO), (4, FOUR), (8, EIGHT)])
def test_a_layout_trains_as_one_process_does(
    ranks: int, layouts: dict[str, Layout], tmp_path: Path
) -> None:
    found = differences(cases_of(layouts), ranks, tmp_path)
    print()
    for name, (loss, norm) in found.items():
        print(f"{ranks} ranks, {name}: loss {loss:.1e}, norm {norm:.1e}")
    # The weights' movement is far above what is tolerated, so that equality says something.
    moved = np.subtract(alone('{"model": {"tied": true}}')["loss"],
                        alone('{"model": {"tied": true}}', 0.0)["loss"])  # fmt: skip
    assert np.abs(moved).max() > 100 * TOLERANCE["float32"]
    for name, (loss, norm) in found.items():
        dtype = name.partition(":")[2]
        assert loss <= TOLERANCE[dtype], name
        assert norm <= {"float32": 1e-5, "float64": 1e-10, "bfloat16": 0.05}[dtype], name


@pytest.mark.slow
def test_what_goes_with_a_layout_changes_no_number(tmp_path: Path) -> None:
    """Recomputed activations, shares in host memory, many microbatches, gathered parameters kept,
    two backwards a step, and Qwen's biases; and two precisions on two ranks as on one."""
    extras = {
        "recomputed": {"layout": shares(shard=2, checkpoint_activations=True)},
        "recomputed_tp": {"layout": shares(tensor=2, checkpoint_activations=True)},
        "recomputed_pp": {"layout": shares(pipeline=2, checkpoint_activations=True)},
        "recomputed_zb": {
            "layout": {**PIPELINES["interleaved_zero_bubble"], "checkpoint_activations": True}
        },
        "offload": {"layout": shares(shard=2, cpu_offload=True)},
        "offload_tp": {"layout": shares(tensor=2, cpu_offload=True)},
        "microbatches": {"layout": shares(pipeline=2, microbatches=8)},
        "zbv_microbatches": {"layout": {**PIPELINES["zbv"], "microbatches": 8},
                             "model": {"tied": True}},
        "calls_pp": {"layout": PIPELINES["1f1b"], "model": {"tied": True}, "calls": 2},
        "calls_zbv": {"layout": PIPELINES["zbv"], "model": {"tied": True}, "calls": 2},
        "kept": {"layout": shares(shard=2, reshard_after_forward=False)},
        "biases": {"layout": shares(tensor=2, sequence_parallel=True),
                   "model": {"attention_bias": True, "mlp_bias": True}},
    }  # fmt: skip
    for name, (loss, norm) in differences(extras, 2, tmp_path).items():
        print(f"{name}: loss {loss:.1e}, norm {norm:.1e}")
        assert loss <= TOLERANCE["float32"] and norm <= 1e-5, name
