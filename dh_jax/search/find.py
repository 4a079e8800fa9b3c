"""Find weights by training proxies, and leave them as a data config with a report.

Shapes: N proxies, M sources.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from dh_jax.config import MixingConfig, weights_of
from dh_jax.data.seeding import derive
from dh_jax.data.store import write_json
from dh_jax.errors import ConfigError, DataError
from dh_jax.influence.optimizer import resolve_targets
from dh_jax.mixing import regmix
from dh_jax.mixing.doremi import average_weights
from dh_jax.runconfig import refuse_other_config, save_config
from dh_jax.search.config import SearchRunConfig, check_search
from dh_jax.search.proxies import Progress, Proxy, Result, train_all
from dh_jax.search.written import write_data_config

CONFIRMED = ("found", "configured")  # names of the two proxies that are trained at the end


class Fit(NamedTuple):
    """How far RegMix's regression can be believed; nats a target, on the target."""

    measured_N: list[float]
    left_out_N: list[float]  # each predicted by a fit on all others
    error: float  # root mean square of their difference
    spread: float  # standard deviation of the measured: the error of knowing nothing
    rank_correlation: float  # Spearman's, of the two


class Finding(NamedTuple):
    """What a search found."""

    method: str
    targets: dict[str, float]  # probe -> weight; of DoReMi, which has none, every source alike
    configured: dict[str, float]  # the weights that the data config has
    weights: dict[str, float]  # the weights found
    tried: list[dict[str, float]]  # RegMix's mixtures; DoReMi's weights after each move
    fit: Fit | None  # RegMix's
    excess: dict[str, float] | None  # DoReMi's: final loss of the proxy less the reference's
    predicted: dict[str, float] | None  # loss on the target of `CONFIRMED`, by the fit
    measured: dict[str, float] | None  # and as trained; None without `confirm`


def find_weights(config: SearchRunConfig, progress: Progress | None = None) -> Finding:
    """Search, and write ``data.yaml`` (the config with the weights found) and ``finding.json``
    into ``out``; `write_search_report` makes a page of what is returned.

    A search that was broken off goes on with ``resume``: proxies that have a result are not
    trained again.

    Args:
        config: see `SearchRunConfig`.
        progress: called as proxies finish, with how many are done and how many there are.

    Raises:
        ConfigError: the config is wrong, or ``out`` already holds a search.
        StateError: ``resume`` finds a search of another config.
        UserError: a proxy failed.
    """
    config = check_search(config)
    folder = Path(config.out)
    if (folder / "config.yaml").exists():
        if not config.resume:
            raise ConfigError(
                f"{folder} already holds a search; add resume=true or choose another out="
            )
        refuse_other_config(folder, config)
    save_config(folder, config)
    search = by_regmix if config.search.method == "regmix" else by_doremi
    finding = search(config, progress)
    remark = warning_of(finding)
    write_data_config(config.data, finding.weights, finding.method, folder / "data.yaml", remark)
    write_json(folder / "finding.json", {"version": 1, **_plain(finding)})
    return finding


# --- RegMix --------------------------------------------------------------------------------------


def by_regmix(config: SearchRunConfig, progress: Progress | None = None) -> Finding:
    """Train on many mixtures, regress the target's loss on the weights, take the best.

    References:
        Liu et al. 2025, arXiv:2407.01492; see `dh_jax.mixing.regmix`. Losses are of the probe
        split, so that the evaluation split stays unseen.
    """
    search, configured = config.search, weights_of(config.data.sources)
    names, prior_M = list(configured), np.array(list(configured.values()))
    if not prior_M.all():
        zero = names[int(np.argmin(prior_M))]
        raise ConfigError(f"weight of source {zero!r} is 0, so RegMix never tries it; remove it")
    targets = resolve_targets(
        config.influence.targets, list(config.data.probes or config.data.sources)
    )
    rng = np.random.default_rng(derive(config.training.seed, "regmix"))
    weights_NM = regmix.sample_mixtures(rng, prior_M, search.proxies)
    proxies = [
        Proxy(f"{n:03d}", dict(zip(names, row.tolist(), strict=True)))
        for n, row in enumerate(weights_NM)
    ]
    more = len(CONFIRMED) if search.confirm else 0
    results = train_all(config, proxies, _of(progress, 0, len(proxies) + more))
    losses_N = np.array([on_target(result, targets) for result in results])
    model = regmix.fit(weights_NM, losses_N)
    best_M = regmix.best_weights(rng, model, prior_M, candidates=search.candidates, top=search.top)
    found = dict(zip(names, best_M.tolist(), strict=True))
    both = {"found": found, "configured": configured}
    measured = None
    if search.confirm:
        last = [Proxy(name, both[name]) for name in CONFIRMED]
        trained = train_all(config, last, _of(progress, len(proxies), len(proxies) + more))
        measured = {result.name: on_target(result, targets) for result in trained}
    predicted_2 = regmix.predict(model, np.array([list(w.values()) for w in both.values()]))
    return Finding(
        "regmix", targets, configured, found, [proxy.weights for proxy in proxies],
        judge(losses_N, model), None, dict(zip(both, predicted_2.tolist(), strict=True)), measured,
    )  # fmt: skip


FAR, LEAST = 3.0, 0.02  # a miss worth a word: times the error of leaving one out; nats


def warning_of(finding: Finding) -> str | None:
    """What to say where a run with the weights found did worse than with those configured, or far
    from what the fit predicted."""
    if finding.measured is None:
        return None
    if finding.measured["found"] <= finding.measured["configured"]:
        return _missed(finding)
    found, configured = finding.measured["found"], finding.measured["configured"]
    cure = "search.proxies or training.steps" if finding.method == "regmix" else "training.steps"
    return (
        f"a run with the weights found lost {found:.3f} nats a token, with those configured "
        f"{configured:.3f}: search longer ({cure}) before they are used"
    )


def _missed(finding: Finding) -> str | None:
    if finding.predicted is None or finding.fit is None or finding.measured is None:
        return None
    miss = abs(finding.measured["found"] - finding.predicted["found"])
    if miss <= max(FAR * finding.fit.error, LEAST):
        return None
    source = max(finding.weights, key=lambda name: finding.weights[name])
    most = max(tried[source] for tried in finding.tried)
    beyond = ""
    if finding.weights[source] > most + 0.05:
        beyond = (
            f": they give {source} {finding.weights[source]:.2f}, no proxy more than {most:.2f}"
        )
    return (
        f"a run with the weights found ended {miss:.3f} nats from what the fit predicted{beyond}. "
        "They are better than those configured; whether others are better still, more proxies "
        "would say (search.proxies)"
    )


def on_target(result: Result, targets: dict[str, float]) -> float:
    """Held-out loss on the target: the weighted mean over its probes.

    Raises:
        DataError: a probe was not judged, or held nothing.
    """
    total = 0.0
    for name, weight in targets.items():
        loss = result.losses.get(name, np.nan)
        if not np.isfinite(loss):
            raise DataError(
                f"proxy {result.name}: the loss of probe {name!r} is {loss}; it holds no targets"
            )
        total += weight * loss
    return total


def judge(losses_N: np.ndarray, model: regmix.Regression) -> Fit:
    """How well the regression predicts each proxy from the others."""
    ranks = [np.argsort(np.argsort(x)).astype(float) for x in (losses_N, model.left_out_N)]
    level = all(rank.std() > 0 for rank in ranks)
    return Fit(
        losses_N.tolist(), model.left_out_N.tolist(), model.error, float(losses_N.std()),
        float(np.corrcoef(np.stack(ranks))[0, 1]) if level else 0.0,
    )  # fmt: skip


# --- DoReMi --------------------------------------------------------------------------------------


def by_doremi(config: SearchRunConfig, progress: Progress | None = None) -> Finding:
    """Train a reference, then a proxy that is steered by its excess loss over it; the answer is
    the mean of the proxy's weights over its moves.

    References:
        Xie et al. 2023, arXiv:2305.10429, algorithm 1 and its iterated form; see
        `dh_jax.mixing.doremi`. It knows no target. The reference is trained on the configured
        weights, and its losses are those on held-out rows of each source.
    """
    search, configured = config.search, weights_of(config.data.sources)
    names, weights = list(configured), configured
    sources = dict.fromkeys(names, 1 / len(names))
    total = 2 * search.rounds + (len(CONFIRMED) if search.confirm else 0)
    done = 0

    def one(proxy: Proxy) -> Result:
        nonlocal done
        (result,) = train_all(config, [proxy], _of(progress, done, total))
        done += 1
        return result

    for number in range(1, search.rounds + 1):
        reference = one(Proxy(f"reference-{number}", weights, split="eval"))
        mixing = MixingConfig(
            policy="doremi", interval=1, min_weight=0.0, max_weight=1.0,
            learning_rate=search.learning_rate, exploration=search.exploration,
            reference={name: reference.losses[name] for name in names},
        )  # fmt: skip
        proxy = one(Proxy(f"proxy-{number}", weights, mixing, "eval"))
        moves_SM = np.array([[move[name] for name in names] for move in proxy.moves])
        weights = dict(zip(names, average_weights(moves_SM).tolist(), strict=True))
    excess = {name: proxy.losses[name] - reference.losses[name] for name in names}
    measured = None
    if search.confirm:
        both = {"found": weights, "configured": configured}
        trained = train_all(
            config, [Proxy(name, both[name], split="eval") for name in CONFIRMED],
            _of(progress, done, total),
        )  # fmt: skip
        measured = {result.name: on_target(result, sources) for result in trained}
    return Finding(
        "doremi", sources, configured, weights, proxy.moves, None, excess, None, measured
    )


# --- small parts ---------------------------------------------------------------------------------


def _of(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of a part, as that of the whole."""
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def _plain(finding: Finding) -> dict[str, object]:
    values = finding._asdict()
    return values | {"fit": None if finding.fit is None else finding.fit._asdict()}
