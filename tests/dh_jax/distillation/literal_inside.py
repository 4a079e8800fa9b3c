"""Losses on hidden states and relations, written out in float64 a token at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def algorithm_1(student, teacher, split_heads, temperature):
    """BitDistill's Algorithm 1 as it is printed: whole rows, no mask.

    ``student`` and ``teacher``: [3, B, heads, L, d], the states of Q, K and V.
    """
    loss = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        relations = []
        for values in (ours, theirs):
            B, heads, L, d = values.shape
            D = heads * d // split_heads
            values = values.transpose(1, 2).reshape(B, L, split_heads, D).transpose(1, 2)
            values = F.normalize(values, dim=-1)
            relation = values @ values.transpose(-2, -1)
            relation = (relation / temperature).reshape(-1, L)
            relations.append(F.softmax(relation, dim=-1).clamp(min=1e-8))
        s_prob, t_prob = relations
        loss = loss + F.kl_div(torch.log(s_prob), t_prob, reduction="batchmean", log_target=False)
    return loss


def equation_11_12(student, teacher, heads):
    """BitDistill's equations 11 and 12 with one layer and alpha = 1: whole rows, no mask.

    ``student`` and ``teacher``: three of [L, heads * d], one document.
    """
    loss = 0.0
    for A_student, A_teacher in zip(student, teacher, strict=True):
        L = len(A_student)
        for a in range(heads):
            for t in range(L):
                R = []
                for A in (A_teacher, A_student):
                    d_r = A.shape[1] // heads
                    A_a = A[:, a * d_r : (a + 1) * d_r]
                    R.append(torch.softmax(A_a[t] @ A_a.T / d_r**0.5, dim=-1))
                loss = loss + (R[0] * torch.log(R[0] / R[1])).sum() / (heads * L)
    return loss


def by_token(form, student, teacher, segments, *, heads, temperature, causal):
    """``loss_BT`` of every form with masks, for states [B, T, H, h] in float64."""
    B, T = segments.shape
    rows = []
    for b in range(B):
        for t in range(T):
            own = [
                s for s in range(T)
                if segments[b, s] == segments[b, t] and (s <= t or not causal)
            ]  # fmt: skip
            rows.append(_of_token(form, student, teacher, b, t, own, heads, temperature))
    return torch.stack(rows).reshape(B, T)


def _of_token(form, student, teacher, b, t, own, heads, temperature):
    relations = (("rotated_query", "rotated_key"), ("value", "value"))
    if form != "minilm":
        relations = tuple((name, name) for name in ("query", "key", "value"))
    H = student["rotated_query"].shape[2] if form == "minilm" else heads
    total = 0.0
    for asks, asked in relations:
        for a in range(H):
            distributions = []
            for states in (teacher, student):
                x, ys = _vectors(form, states, asks, asked, b, t, own, a, H)
                if form == "bitdistill_algorithm":
                    x, ys = x / x.norm(), ys / ys.norm(dim=-1, keepdim=True)
                    p = torch.softmax(ys @ x / temperature, -1).clamp(min=1e-8)
                else:
                    p = torch.softmax(ys @ x / len(x) ** 0.5, -1)
                distributions.append(p)
            p, q = distributions
            total = total + (p * torch.log(p / q)).sum() / H
    return total


def _vectors(form, states, asks, asked, b, t, own, a, heads):
    if form == "minilm":
        group = states["rotated_query"].shape[2] // states["value"].shape[2]
        head = a if asks == "rotated_query" else a // group
        return states[asks][b, t, head], states[asked][b, own, a // group]
    flat = states[asks][b].flatten(1)
    d = flat.shape[1] // heads
    part = flat[:, a * d : (a + 1) * d]
    return part[t], part[own]
