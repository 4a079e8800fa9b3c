"""What a training step of 1 B and 7 B parameters needs on 64 devices: compiled, never run.

    python -m benchmarks.meshes

Memory of a device and collectives are XLA's own account of the real step: AdamW, float32
parameters, bfloat16 activations, layers scanned and rematerialised, one row of 2,048 tokens for
each part that rows are split into; for 64 simulated CPU devices.
"""

from __future__ import annotations

import os
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"
os.environ["JAX_PLATFORMS"] = "cpu"

from dh_jax.config import MeshConfig, ModelConfig, TrainingConfig
from dh_jax.distributed.mesh import make_mesh, row_ways
from dh_jax.dryrun import abstract_step, collectives, step_bytes

HOW: dict[str, Any] = {"dtype": "bfloat16", "scan_layers": True, "remat": "nothing_saveable"}
MODELS = {  # the shapes of Llama 3.2 1B and of Llama 2 7B with its key-value heads grouped
    "1 B": (ModelConfig(
        width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192, **HOW,
    ), 128_256),
    "7 B": (ModelConfig(
        width=4096, layers=32, heads=32, kv_heads=8, mlp_width=11_008, **HOW,
    ), 32_000),
}  # fmt: skip
MESHES = [(1, 64, 1, 1), (8, 8, 1, 1), (1, 16, 1, 4), (1, 16, 4, 1)]
ROW_LENGTH = 2048


def measure(
    model: ModelConfig, vocab_size: int, sizes: tuple[int, int, int, int]
) -> tuple[float, dict[str, tuple[int, float]]]:
    """MiB of a device, and (count, MiB) of each kind of collective."""
    mesh = make_mesh(MeshConfig("benchmark", *sizes))
    training = TrainingConfig(batch_size=row_ways(mesh))
    step, arguments = abstract_step(
        model, training, mesh, vocab_size=vocab_size, row_length=ROW_LENGTH
    )
    compiled = step.lower(*arguments).compile()
    traffic = {k: (x.times, x.bytes / 2**20) for k, x in collectives(compiled).items()}
    return step_bytes(compiled) / 2**20, traffic


def main() -> None:
    print("| model | mesh (data x fsdp x sequence x tensor) | GiB a device | collectives, GiB |")
    print("| --- | --- | ---: | --- |")
    for name, (model, vocab_size) in MODELS.items():
        for sizes in MESHES:
            memory, traffic = measure(model, vocab_size, sizes)
            listed = ", ".join(f"{n} {k} {m / 1024:.1f}" for k, (n, m) in sorted(traffic.items()))
            mesh = " x ".join(map(str, sizes))
            print(f"| {name} | {mesh} | {memory / 1024:.1f} | {listed} |", flush=True)


if __name__ == "__main__":
    main()
