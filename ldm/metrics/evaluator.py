"""Evaluators: the metrics a stage or `ldm evaluate` can compute, each a configuration that runs on a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from ldm.config.schema import BY_KIND
from ldm.metrics.abilities import Abilities
from ldm.metrics.adherence import Adherence
from ldm.metrics.clip_score import ClipScore
from ldm.metrics.completion import Completion
from ldm.metrics.distances import Frechet
from ldm.metrics.diversity import Diversity
from ldm.metrics.grounding import Grounding
from ldm.metrics.language import Language
from ldm.metrics.layout import Layout
from ldm.metrics.neighbours import Neighbours
from ldm.metrics.reconstruction import Reconstruction
from ldm.metrics.subsets import Subsets
from ldm.metrics.told import ToldViews
from ldm.metrics.translation import Translation
from ldm.metrics.units import Units
from ldm.metrics.wobble import Wobble
from ldm.metrics.written import Captions

Evaluator = Annotated[
    Adherence
    | Abilities
    | Diversity
    | Units
    | Completion
    | Reconstruction
    | Translation
    | Frechet
    | ClipScore
    | Neighbours
    | ToldViews
    | Grounding
    | Wobble
    | Subsets
    | Captions
    | Language
    | Layout,
    BY_KIND,
]


def check_weights(metrics: Sequence[Any]) -> None:
    """Raises UserError for weights that are not here, before anything is measured."""
    for metric in metrics:
        if hasattr(metric, "check_weights"):
            metric.check_weights()
