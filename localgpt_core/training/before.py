"""What a run needs of its text, held to before anything is computed."""

from contextlib import suppress

import numpy as np

from localgpt_core.common.validation import require, require_integer
from localgpt_core.config import CODEBOOK_BATCHES, LocalGPTConfig, TrainConfig, check_run
from localgpt_core.corpus.batches import batch, windows
from localgpt_core.corpus.corpus import Corpus

__all__ = ["check_corpus"]


def check_corpus(model: LocalGPTConfig, train: TrainConfig, corpus: Corpus) -> None:
    """Raise ``ValueError`` for what a run would fail by, be it in its last step.

    That is a seed that draws no batches, a vocabulary of another size, a context longer than the validation
    split, or more codes to fit than different vectors in the batches for it.
    """
    check_run(model, train)
    require_integer("seed", train.seed, 0, 2**64 - 1)
    allowed = f"must be the {corpus.vocab_size} of corpus {corpus.name!r}"
    require(model.vocab_size == corpus.vocab_size, "vocab_size", model.vocab_size, allowed)
    windows(corpus.val, model.block_size)
    if model.vq_init == "kmeans":
        # A batch that no memory holds is not the text's fault, and the run says so itself.
        with suppress(MemoryError):
            _check_codes(model, train, corpus)


def _check_codes(model: LocalGPTConfig, train: TrainConfig, corpus: Corpus) -> None:
    """Refuse more codes than distinct vectors: a token's is a function of the characters up to it."""
    streams = sum(map(model.has_bottleneck, range(model.n_layer))) if model.vq_shared else 1
    needed = -(-model.vq_codes // streams)
    sizes = {"batch_size": train.batch_size, "block_size": model.block_size, "seed": train.seed}
    drawn = [batch(corpus.train, **sizes, step=step)[0] for step in range(CODEBOOK_BATCHES)]
    ids = np.concatenate([x.numpy() for x in drawn])
    context, found = np.zeros(len(ids), dtype=np.int64), 0
    for column in ids.T:
        # context[i] numbers the characters of row i so far, densely.
        distinct, context = np.unique(context * corpus.vocab_size + column, return_inverse=True)
        found += len(distinct)
        if found >= needed:
            return
    most = f"k-means has at most {found * streams} different vectors of corpus {corpus.name!r}"
    require(False, "vq_codes", model.vq_codes, f"{most} to fit them to")
