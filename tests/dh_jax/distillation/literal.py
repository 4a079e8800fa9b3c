"""Distillation losses written out over full tables in float64, differentiated by torch."""

from __future__ import annotations

import math

import numpy as np
import torch


def kl(p, q):
    """Sum of p log(p / q), 0 where p is."""
    return torch.where(p > 0, p * (torch.log(p.clamp(min=1e-300)) - torch.log(q)), 0.0).sum(-1)


def divergence(name, beta, p, q):
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jensen_shannon":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skewed_forward_kl":
        return kl(p, beta * p + (1 - beta) * q)
    if name == "skewed_reverse_kl":
        return kl(q, (1 - beta) * p + beta * q)
    assert name == "total_variation"
    return (p - q).abs().sum(-1) / 2


def sparse(name, beta, estimator, ids, log_probs, log_tail, q):
    """One token's estimate; ``q`` is the student's full distribution."""
    p = torch.exp(log_probs)
    q_ids = q[ids]
    if estimator == "sampled":
        return (log_probs - torch.log(q_ids)).mean()
    if estimator == "both_renormalised":
        return divergence(name, beta, p / p.sum(), q_ids / q_ids.sum())
    rest = torch.ones_like(q).index_fill(0, ids, 0.0) @ q
    tail = torch.exp(log_tail) if estimator == "tail" else torch.zeros_like(log_tail)
    p = torch.cat([p, tail[None]])
    return divergence(name, beta, p / p.sum(), torch.cat([q_ids, rest[None]]))


def loss_and_gradients(
    student, teacher, targets, mask, weights, *, name, beta, mix, squared=True, vocabulary=None,
    estimator=None,
):  # fmt: skip
    """``loss_BT`` and the gradients of ``sum(weights * loss)`` in each of ``student``'s arrays.

    Args:
        student: (logits,), or (hidden, kernel_DV, bias_V or None, cap or None), NumPy.
        teacher: logits, or (ids, log_probs, log_tail).
        mix: (weight, cross_entropy or None, temperature).
    """
    *arrays, cap = student if len(student) > 1 else (*student, None)
    leaves = [
        None if a is None else torch.tensor(np.asarray(a, np.float64), requires_grad=True)
        for a in arrays
    ]
    logits = leaves[0]
    if len(leaves) > 1:
        logits = leaves[0] @ leaves[1]
        logits = logits if leaves[2] is None else logits + leaves[2]
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    weight, hard, temperature = mix
    B, T, V = logits.shape
    losses = []
    for b, t in np.ndindex(B, T):
        z = logits[b, t]
        if estimator is None:
            given = torch.tensor(np.asarray(teacher[b, t], np.float64)) / temperature
            n = min(V, given.numel(), vocabulary or V)
            common = torch.isfinite(z[:n]) & torch.isfinite(given[:n])
            q = torch.softmax(z[:n][common] / temperature, -1)
            p = torch.softmax(given[:n][common], -1)
            loss = divergence(name, beta, p, q) if common.any() else z.new_zeros(())
        else:
            ids, log_probs, log_tail = (torch.tensor(np.asarray(x[b, t])) for x in teacher)
            q = torch.softmax(z / temperature, -1)
            loss = sparse(
                name, beta, estimator, ids.long(), log_probs.double(), log_tail.double(), q
            )
        loss = weight * loss * (temperature**2 if squared else 1.0)
        if hard is not None:
            loss = loss + hard * (torch.logsumexp(z, -1) - z[targets[b, t]])
        losses.append(loss if mask[b, t] else torch.zeros((), dtype=torch.float64))
    loss_BT = torch.stack(losses).reshape(B, T)
    total = (loss_BT * torch.tensor(np.asarray(weights, np.float64))).sum()
    wanted = [leaf for leaf in leaves if leaf is not None]
    if not total.requires_grad:
        return loss_BT.numpy(), [np.zeros(leaf.shape) for leaf in wanted]
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return loss_BT.detach().numpy(), [
        np.zeros(leaf.shape) if g is None else g.numpy()
        for leaf, g in zip(wanted, found, strict=True)
    ]


def entropy_bits(p):
    """Entropy of a distribution in bits."""
    return float(-(p * torch.log(p)).sum() / math.log(2))
