"""Training and evaluating MIMIC with `transformers.Trainer`: what batches hold, the recipe, ranking a knowledge base.

The parts are usable on their own: a plain `Trainer` needs a [`MimicModel`], a [`MentionEntityCollator`] as its
`data_collator`, and `remove_unused_columns=False`.
"""

from .arguments import MimicTrainingArguments
from .calibration import calibrate
from .collator import MentionEntityCollator
from .evaluation import HITS_AT, RankedMentions, in_batch_metrics, mel_ranking, rank_mentions
from .knowledge_base import KnowledgeBase, require_columns
from .trainer import MimicTrainer
from .upload import INDEX_FOLDER

__all__ = [
    "HITS_AT",
    "INDEX_FOLDER",
    "KnowledgeBase",
    "MentionEntityCollator",
    "MimicTrainer",
    "MimicTrainingArguments",
    "RankedMentions",
    "calibrate",
    "in_batch_metrics",
    "mel_ranking",
    "rank_mentions",
    "require_columns",
]
