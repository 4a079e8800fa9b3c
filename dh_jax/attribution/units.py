"""What one unit of helpfulness is, in the words of a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unit_of(estimator: Mapping[str, Any]) -> str:
    """The unit of minus the scores, of an estimator's config.

    Inner products through an inverse curvature say what a document's weight does (Koh & Liang
    2017, arXiv:1703.04730, equation 2), those without what a step does (TracIn, Pruthi et al.
    2020, arXiv:2002.08484, section 3), cosines neither.
    """
    name, kernel = estimator["name"], estimator["arguments"].get("kernel", "fisher")
    nats = "nats a token" if estimator["reduction"] == "mean" else "nats"
    if name == "gradient_cosine" or (name, kernel) == ("projection", "cosine"):
        return "A cosine: from \u22121 to 1, without a unit."
    if (name, kernel) == ("projection", "trak"):
        return "In the unit of TRAK's kernel, of which the order is meant."
    if name == "gradient_dot":
        return (
            f"In {nats} of the query, for a step of plain gradient descent on the document alone "
            "at a learning rate of 1: at 0.001 it is a thousandth."
        )
    if name == "newton_step":
        return f"In {nats} of the query: what the document's presence among those fitted is worth."
    return (
        f"To first order, in {nats} of the query, for a weight of 1 of the document in the "
        "training objective. Through a damped curvature, which makes numbers large: read order "
        "and ratios, not sizes."
    )
