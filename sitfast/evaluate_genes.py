"""How like real cells are generated ones: what a classifier reads, the moments of each gene, and how new the cells are.

Everything is compared with the held-out cells, whose types the generated ones have in the same shares; and beside each figure
stands the one of the training cells, which are real: the most that can be expected of a model that saw nothing else.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sitfast.data.genes import Genes
from sitfast.data.sampler import held_out
from sitfast.errors import SitfastError


def split(source: Genes, val_samples: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training rows, held-out rows); a fifth that the figures alone have not seen, where none were held out."""
    return held_out(source.num_rows, val_samples or source.num_rows // 5)


def read_cells(values: Tensor, labels: Tensor, source: Genes, *, val_samples: int) -> dict[str, float]:
    """Figures of generated expression `[N, G]` asked for with labels `[N]`:

    classifier_accuracy, label_share      of held-out cells, and of generated ones, that a logistic regression, fitted to
                                          the training cells, reads as their type
    mean_correlation, variance_…          Pearson's, over genes, of the moments of generated and of held-out cells;
    real_mean_correlation, …              of training and of held-out cells
    total_variance, real_…                the sum over genes of the variances, of generated and of training cells, as a
                                          multiple of that of held-out ones: a correlation does not see it
    distance, real_distance               median distance to the nearest training cell, of generated and of held-out cells:
                                          much less than the real one would be copies
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import pairwise_distances_argmin_min
    except ImportError:
        raise SitfastError('the figures of genes need scikit-learn: pip install "sitfast[genes]"') from None
    train_rows, test_rows = split(source, val_samples)
    train, test, made = source.values(train_rows), source.values(test_rows), values.numpy()
    scaled = source.panel.standardize
    known, asked = source.labels(train_rows), labels.numpy()
    result: dict[str, float] = {}
    if len(np.unique(known)) > 1:
        classifier = LogisticRegression(C=0.1, max_iter=1000).fit(scaled(train), known)
        result["classifier_accuracy"] = float(classifier.score(scaled(test), source.labels(test_rows)))
        result["label_share"] = float(classifier.score(scaled(made), asked))
    for name, moment in (("mean", np.mean), ("variance", np.var)):
        of_test = moment(test, axis=0, dtype=np.float64)
        for whose, cells in (("", made), ("real_", train)):
            of_cells = moment(cells, axis=0, dtype=np.float64)
            result[f"{whose}{name}_correlation"] = float(np.corrcoef(of_cells, of_test)[0, 1])
            if name == "variance":
                result[f"{whose}total_variance"] = float(of_cells.sum() / of_test.sum())
    for whose, cells in (("", made), ("real_", test)):
        nearest = pairwise_distances_argmin_min(cells, train)[1]
        result[f"{whose}distance"] = float(np.median(nearest))
    return result


def describe(result: dict[str, float], num: int, guidance: float) -> str:
    """The figures in words."""
    lines = [f"{num} cells (guidance {guidance:g}) of the types of the held-out ones     generated    real"]
    rows = [
        ("read as their type by a classifier", "label_share", "classifier_accuracy", ".1%"),
        ("means of the genes, correlation with held-out", "mean_correlation", "real_mean_correlation", ".3f"),
        ("variances of the genes, the same", "variance_correlation", "real_variance_correlation", ".3f"),
        ("their sum, as a multiple of that of held-out", "total_variance", "real_total_variance", ".2f"),
        ("median distance to the nearest training cell", "distance", "real_distance", ".2f"),
    ]
    for text, made, real, form in rows:
        if made in result:
            lines.append(f"  {text:<58} {result[made]:>10{form}} {result[real]:>7{form}}")
    return "\n".join(lines)
