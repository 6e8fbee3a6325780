"""Training and evaluating MIMIC with `transformers.Trainer`: what batches hold, the recipe, ranking a knowledge base.

The parts are usable on their own: a plain `Trainer` needs a [`MimicModel`], a [`MentionEntityCollator`] as its
`data_collator`, and `remove_unused_columns=False`.
"""

from .trainer import *  # noqa: F403
