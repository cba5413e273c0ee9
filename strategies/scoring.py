"""What an answer is worth. Pure, and free of torch: the daemon recomputes scores with it.

Free answers are scored as SQuAD does (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1): lower case,
without punctuation, articles and surplus white space; then exact match, and F1 over the words.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from strategies.contract import Metric, Record

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_normalise(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 when the two are the same after normalisation, else 0."""
    return float(squad_normalise(prediction) == squad_normalise(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of word precision and recall, in [0, 1]; two empty answers agree."""
    told, gold = squad_normalise(prediction).split(), squad_normalise(answer).split()
    if not told or not gold:
        return float(told == gold)
    common = sum((Counter(told) & Counter(gold)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(told), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def score(metric: Metric, prediction: str, answer: str) -> float:
    """The value of one answer under a task's metric, in [0, 1].

    Accuracy compares labels as they are, but for case and surrounding space: `not` and `nots` differ,
    and so do `a` and `the`.
    """
    if metric is Metric.TOKEN_F1:
        return token_f1(prediction, answer)
    if metric is Metric.EXACT_MATCH:
        return exact_match(prediction, answer)
    return float(_label(prediction) == _label(answer))


@dataclass(frozen=True, kw_only=True)
class ClassScores(Record):
    """One label. Precision and recall are 0 where they would divide by nothing."""

    label: str
    precision: float
    recall: float
    f1: float
    support: int  # rows with this label


@dataclass(frozen=True, kw_only=True)
class Classification(Record):
    """A task with closed labels in numbers."""

    accuracy: float
    macro_f1: float  # plain mean over the labels that occur in the suite
    classes: tuple[ClassScores, ...]


def classification_report(
    golds: Sequence[str], predictions: Sequence[str], labels: Sequence[str]
) -> Classification:
    """Accuracy, macro-F1, and per-class precision and recall.

    Labels that no suite row has count for precision of the others (a wrong guess is a wrong guess), but
    not for the macro mean: their recall is undefined. Labels are compared as `score` compares them.
    """
    pairs = [(_label(gold), _label(told)) for gold, told in zip(golds, predictions, strict=True)]
    classes = tuple(_class_scores(label, pairs) for label in labels)
    present = [c for c in classes if c.support]
    return Classification(
        accuracy=sum(gold == told for gold, told in pairs) / len(pairs) if pairs else 0.0,
        macro_f1=sum(c.f1 for c in present) / len(present) if present else 0.0,
        classes=classes,
    )


def _class_scores(label: str, pairs: Sequence[tuple[str, str]]) -> ClassScores:
    key = _label(label)
    hits = sum(gold == key == told for gold, told in pairs)
    told = sum(told == key for _, told in pairs)
    support = sum(gold == key for gold, _ in pairs)
    precision = hits / told if told else 0.0
    recall = hits / support if support else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return ClassScores(label=label, precision=precision, recall=recall, f1=f1, support=support)


def _label(text: str) -> str:
    return text.strip().casefold()
