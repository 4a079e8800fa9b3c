"""Training: the loop that feeds the step, steers, judges, logs and saves.

A run is a pure function of its config. Everything that changes while it goes on (parameters,
optimizer and policy, position of every loader) is in the checkpoint, so a run that was killed
continues with the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dh_jax import distilling, trackers
from dh_jax.config import (
    RunConfig,
    load_data_config,
    public_run,
    weights_of,
)
from dh_jax.data.loader import Loader
from dh_jax.data.store import write_json
from dh_jax.data.tokenization import TokenizerWrapper
from dh_jax.distributed.agreement import any_host, gather, wait_for_all
from dh_jax.distributed.checkpoint import Checkpoints
from dh_jax.distributed.mesh import (
    loader_shard,
    make_mesh,
    replicate,
    to_device,
)
from dh_jax.distributed.placement import check_heads, on_mesh, param_shardings, warn_unsplit
from dh_jax.distributed.processes import join
from dh_jax.errors import ConfigError, DataError
from dh_jax.evaluate import make_evaluation
from dh_jax.functions import LossFn, Params, as_argument
from dh_jax.influence.calculator import DataInfCalculator
from dh_jax.influence.optimizer import InfluenceAwareOptimizer, InfluenceState
from dh_jax.metrics import train_record
from dh_jax.mixing.policy import SAMPLED
from dh_jax.mixing.registry import SIZED, make_policy
from dh_jax.models import decoder
from dh_jax.models.kernels import check_kernel
from dh_jax.models.start import resolve, start
from dh_jax.ranking import rank_documents
from dh_jax.runconfig import (
    check_training,
    refuse_other_config,
    resolve_reference,
    save_config,
    source_tokens,
    training_loader,
)
from dh_jax.runlog import Listener, Record, RunLog, later
from dh_jax.runstate import restore_run, save_run
from dh_jax.sampling import Samplers
from dh_jax.signals import stop_signals
from dh_jax.steering import by_source, decide_next, move_weights
from dh_jax.step import make_optimizer, make_schedule, make_step

GENTLE = 1e-3  # the highest learning rate for all weights of a trained model without a warning


class Run(NamedTuple):
    """Everything a loop needs, built from a config by `open_run`."""

    config: RunConfig
    mesh: Mesh
    tokenizer: TokenizerWrapper
    loader: Loader
    samplers: Samplers | None  # None where nothing needs influence
    loss_fn: LossFn  # against the data: what is trained unless distilled, and what is judged
    calculator: DataInfCalculator
    optimizer: InfluenceAwareOptimizer
    params: Params
    state: InfluenceState
    key: jax.Array
    distilled: distilling.Distilled | None  # what is trained instead


def check(config: RunConfig) -> RunConfig:
    """Validate a run's config as a whole; returns it with its data config typed.

    Raises:
        ConfigError: names the value, the limit and the cure.
    """
    check_training(config.training)
    distilling.check_distillation(config)
    data, rate = load_data_config(config.data), config.training.learning_rate
    if config.model.pretrained and not config.model.lora.rank and rate > GENTLE:
        warnings.warn(
            f"training.learning_rate is {rate:g}, at which a trained model gets worse "
            f"before it gets better; {GENTLE / 10:g} is usual for all weights, and "
            "model.lora.rank=8 trains adapters alone",
            stacklevel=2,
        )
    mixing = resolve_reference(config.mixing, list(data.sources))
    return dataclasses.replace(config, data=data, mixing=mixing, model=resolve(config.model))


def finished(config: RunConfig) -> dict[str, Any] | None:
    """The content of ``run.json`` if the run in ``out`` has been trained to its end, else None.

    Raises:
        StateError: ``out`` holds a run of another config.
    """
    folder = Path(config.out)
    if (folder / "config.yaml").exists():
        refuse_other_config(folder, config)
    path = folder / "run.json"
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    saved = folder / "checkpoints" / str(facts.get("step"))  # not one that somebody took away
    return facts if facts.get("status") == "finished" and saved.exists() else None


def open_run(config: RunConfig, closing: ExitStack) -> Run:
    """Build tokenizer, loaders, model and optimizer; ``closing`` closes the loaders."""
    mesh = make_mesh(config.mesh)
    check_heads(config.model, mesh)
    data, seed = config.data, config.training.seed
    tokenizer = TokenizerWrapper.load(data.tokenizer, add_bos=data.add_bos, add_eos=data.add_eos)
    sizes = source_tokens(data, tokenizer) if config.mixing.policy in SIZED else None
    policy = make_policy(config.mixing, list(data.sources), sizes)
    cached = distilling.find_cache(config)
    join = None if cached is None else cached.join
    loader = training_loader(config, tokenizer=tokenizer, shard=loader_shard(mesh), join=join)
    closing.enter_context(loader)
    samplers = None
    measures = bool(policy.needs & SAMPLED or config.influence.documents)
    check_kernel(config.model.attention, jax.default_backend(), forward_mode=measures)
    if measures:
        samplers = Samplers(data, config.influence, tokenizer, mesh, seed=seed)
        closing.enter_context(samplers)
    key = jax.random.key(seed)
    model = start(config.model, tokenizer.vocab_size, key, lambda p: param_shardings(p, mesh))
    params, loss_fn = model.params, on_mesh(model.loss_fn, mesh)
    warn_unsplit(params, mesh)
    distilled = distilling.open_distillation(config, cached, model, loader, mesh)
    calculator = DataInfCalculator(
        loss_fn, damping=config.influence.damping, parameters=config.influence.parameters
    )
    optimizer = InfluenceAwareOptimizer(
        make_optimizer(config.training),
        policy,
        calculator,
        source_names=loader.names,
        weights=weights_of(data.sources),
        interval=config.mixing.interval,
        warmup=config.mixing.warmup,
        probe_names=list(data.probes or data.sources),
        targets=config.influence.targets,
        budget=config.mixing.budget,
        longest=config.mixing.longest,
        halvings=samplers.halvings if samplers else 0,
    )
    # Placed as the step returns it, so that the second step finds the first one's executable.
    shardings = param_shardings(jax.eval_shape(optimizer.init, params), mesh)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    loader.set_weights(by_source(loader, state.weights_M))
    return Run(
        config, mesh, tokenizer, loader, samplers, loss_fn, calculator, optimizer, params, state,
        replicate(key, mesh), distilled,
    )  # fmt: skip


def train(
    config: RunConfig, *, listeners: tuple[Listener, ...] = (), command: str | None = None
) -> dict[str, Any]:
    """Train to the end, or until Ctrl-C or SIGTERM, which leave a resumable run.

    Args:
        config: see `RunConfig`; ``out`` is the run's folder.
        listeners: called with every metrics record, e.g. a progress bar, and with one of kind
            ``compile`` before a phase that compiles.
        command: how a user would start this run again; kept in ``run.json`` for the report.

    Returns:
        The content of ``run.json``; its ``status`` is ``finished`` or ``interrupted``.

    Raises:
        ConfigError: the config is wrong, or ``out`` already holds a run.
        StateError: ``resume`` finds a run of another config.
        DataError: the data cannot be read, or the loss is no longer finite.
    """
    config = check(config)
    if join(config.mesh) > 0:
        listeners = ()  # one process speaks for all
    folder = Path(config.out)
    started = (folder / "config.yaml").exists()
    if started and not config.resume:
        raise ConfigError(f"{folder} already holds a run; add resume=true or choose another out=")
    if started and (facts := finished(config)):
        return facts
    with ExitStack() as closing:
        run = open_run(config, closing)
        checkpoints = closing.enter_context(
            Checkpoints(
                folder / "checkpoints",
                keep=config.training.keep,
                keep_every=config.training.keep_every,
            )
        )
        step = None
        if checkpoints.steps():
            like = _arrays(run.params, run.state, run.key)
            restored = restore_run(checkpoints, like, run.loader, run.samplers, run.mesh)
            step = restored.step
            run = run._replace(
                params=restored.arrays["params"],
                state=restored.arrays["optimizer"],
                key=jax.random.wrap_key_data(restored.arrays["key"]),
            )
        first = jax.process_index() == 0  # the only one that writes, but for checkpoints
        wait_for_all("the folder has been looked at")
        if first:
            save_config(folder, config)
        if config.training.tensorboard and first:
            scalars = trackers.tensorboard(folder / "tensorboard", step)
            listeners += (closing.enter_context(scalars),)
        if config.training.wandb and first:
            client = trackers.wandb(folder, public_run(config))
            listeners += (closing.enter_context(client),)
        decided = {x["step"]: x for x in gather(later(folder, step or 0, "pace"))[0]}
        log = RunLog(folder if first else None, step=step, listeners=listeners)
        closing.callback(log.close)
        facts = describe(run) | {"command": command}
        return _loop(run, step or 0, checkpoints, log, folder, facts, decided)


def _loop(
    run: Run,
    first: int,
    checkpoints: Checkpoints,
    log: RunLog,
    folder: Path,
    facts: dict[str, Any],
    decided: dict[int, Record],
) -> dict[str, Any]:
    config, training = run.config, run.config.training
    loader, samplers, optimizer = run.loader, run.samplers, run.optimizer
    params, state = run.params, run.state
    _write(folder / "run.json", facts | {"status": "running", "step": first})
    whole = NamedSharding(run.mesh, PartitionSpec())
    shardings = param_shardings(params, run.mesh), param_shardings(state, run.mesh), whole
    train_step = make_step(run.loss_fn, optimizer, len(loader.names), shardings)
    schedule = make_schedule(training)
    evaluate = make_evaluation(
        config.data, run.tokenizer, run.loss_fn, run.mesh,
        rows=training.eval_rows, batch_size=training.batch_size, split=training.eval_split,
    )  # fmt: skip
    compiled: set[str] = set()

    def phase(name: str, step: int) -> Any:
        """Time a phase; its first call is mostly compilation and counted as such."""
        label = name if name in compiled else "compile"
        compiled.add(name)
        if label == "compile":
            log.tell({"kind": "compile", "step": step, "phase": name})
        return log.timed(label, step)

    def judge(step: int) -> None:
        with phase("eval", step):
            log.write({"kind": "eval", "step": step, "domains": evaluate(params)})

    if first == 0:
        judge(0)
    step = first
    stopping = False
    with stop_signals() as stopped:
        while step < training.steps and not stopping:
            step += 1
            learning_rate = float(schedule(step - 1))
            with phase("train", step):
                rows = next(loader, None)
                if any_host(rows is None):
                    raise DataError(
                        f"the data ends before step {step} of {training.steps}; lower "
                        "training.steps, or raise max_epochs of a source"
                    )
                assert rows is not None
                batch = to_device(rows, run.mesh)
                key = jax.random.fold_in(run.key, step)
                if run.distilled is not None:  # another loss at every step, in one program
                    train_step = partial(train_step.func, run.distilled.loss_at(step))
                params, state, metrics = train_step(params, state, batch, key)
                loss = float(metrics.loss)
            if not np.isfinite(loss):
                raise DataError(
                    f"the loss is {loss} at step {step}; resume from step {checkpoints.steps()} "
                    "with a lower training.learning_rate, in a new run"
                )
            # The first step too: its record holds the weights that the run began with.
            if step % training.log_interval == 0 or step in (1, training.steps):
                log.write(train_record(step, metrics, learning_rate, loader, run.mesh, rows))
            if run.distilled and (step % training.eval_interval == 0 or step == training.steps):
                with phase("distillation", step):
                    log.write(run.distilled.record(step, params, batch))
            last = step == training.steps
            judged = step % training.eval_interval == 0 or last
            if optimizer.due(step, state):
                try:
                    with phase("reweight", step):
                        state, record = move_weights(
                            optimizer, samplers, loader, params, state, key,
                            keep=config.mixing.on_failure == "keep",
                        )  # fmt: skip
                except DataError as error:
                    if judged:  # now: a resumption begins behind this step
                        judge(step)
                    state = optimizer.spent(state, np.nan, np.nan)  # not at the next step again
                    arrays = _arrays(params, state, run.key)
                    save_run(checkpoints, step, arrays, loader, samplers, run.mesh)
                    checkpoints.wait()
                    raise DataError(f"{error} (step {step} is saved)") from error
                if record is not None:
                    log.write(record)
                if optimizer.budget is not None:
                    halvings = optimizer.halvings(state)
                    state, record = decide_next(optimizer, state, log.recent, decided)
                    log.write(record)
                    if optimizer.halvings(state) > halvings:
                        compiled.discard("reweight")  # other shapes
            if judged:
                judge(step)
            stopping = any_host(bool(stopped))
            if step % training.checkpoint_interval == 0 or last or stopping:
                with log.timed("checkpoint", step):
                    arrays = _arrays(params, state, run.key)
                    save_run(checkpoints, step, arrays, loader, samplers, run.mesh)
    if step == training.steps and config.influence.documents and samplers:
        with log.timed("ranking", step):
            _write(
                folder / "documents.json",
                rank_documents(
                    config.influence, samplers, run.calculator, params, run.tokenizer, run.key
                ),
            )
    checkpoints.wait()
    facts |= {"status": "finished" if step == training.steps else "interrupted", "step": step}
    _write(folder / "run.json", facts)
    return facts


def _arrays(params: Params, state: InfluenceState, key: jax.Array) -> dict[str, Any]:
    """What of a run a checkpoint holds as arrays."""
    return {"params": params, "optimizer": state, "key": jax.random.key_data(key)}


def _write(path: Path, content: dict[str, Any]) -> None:
    if jax.process_index() == 0:
        write_json(path, content)


def describe(run: Run) -> dict[str, Any]:
    """Facts about a run that its report shows."""
    return {
        "targets": run.optimizer.targets or (run.samplers.targets if run.samplers else {}),
        "parameters": decoder.count_parameters(run.params),
        "frozen": decoder.count_parameters(as_argument(run.loss_fn)),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "sources": list(run.loader.names),
        "versions": {
            name: version(name) for name in ("data-handler", "jax", "flax", "optax", "grain")
        },
    }
