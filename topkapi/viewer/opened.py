"""A run that is looked at: its study and labels, and what takes time, loaded in the background.

The page shows as soon as the study's small arrays are mapped. Until the autoencoder and the tokenizer are there,
requests that need them wait.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import topkapi
from topkapi import published
from topkapi.config import TrainConfig
from topkapi.data.language_model import load_tokenizer
from topkapi.model import Autoencoder
from topkapi.study import Study
from topkapi.train import saved_config
from topkapi.viewer import latents, overview, runs
from topkapi.viewer.labels import Labels
from topkapi.viewer.texts import Texts

KEPT = 256  # latents whose numbers are kept


class Opened:
    """A run, its study, its labels.

    Raises:
        TopkapiError: no such run, a study of another one, damaged labels.
    """

    def __init__(self, run: Path, study: Study) -> None:
        self.run, self.study = run, study
        self.config: TrainConfig = saved_config(run)
        self.published = published.read_config(run)
        study.require_run()
        self.labels = Labels(run, study.identity["autoencoder"], study.n_latents)
        self.describe = lru_cache(KEPT)(self._describe)
        self._loading = ThreadPoolExecutor(2, thread_name_prefix="loading")
        self._autoencoder: Future[Autoencoder] = self._loading.submit(lambda: study.autoencoder)
        self._texts: Future[Texts] = self._loading.submit(self._load_texts)

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return self.run.resolve().name

    @property
    def texts(self) -> Texts:
        """Tokens as texts; waits for the tokenizer, and raises what kept it from loading."""
        return self._texts.result()

    def _load_texts(self) -> Texts:
        return Texts(load_tokenizer(self.config.language_model.name))

    def _describe(self, i: int) -> dict[str, Any]:
        self._autoencoder.result()
        return latents.describe(self.study, i)

    @cached_property
    def overview(self) -> dict[str, Any]:
        """Of all latents."""
        self._autoencoder.result()
        return overview.whole(self.study, self.run)

    def about(self) -> dict[str, Any]:
        """What is looked at, in a few facts."""
        study, header = self.study, self.study.header["about"]
        return {
            "name": self.name,
            "static": False,
            "n_latents": study.n_latents,
            "k": header["k"],
            "d_model": header["d_model"],
            "site": study.identity["site"],
            "language_model": header["language_model"],
            "activation": header["activation"],
            "trained_tokens": self.published.get("summary", {}).get("tokens"),
            "evaluation": runs.evaluation(self.run),
            "study": {
                "n_tokens": study.n_tokens,
                "context": study.context,
                "split": study.identity["split"],
                "reservoir": study.reservoir,
                "n_documents": self.n_documents,
            },
            "version": topkapi.__version__,
            "d_dense": min(header["d_model"], study.n_latents),
        }

    @cached_property
    def n_documents(self) -> int:
        """Documents of which the study has text."""
        arrays, context = self.study.arrays, self.study.context
        first = arrays["context_ids"] * context
        documents = arrays["document_offsets"]
        from_, to = (np.searchsorted(documents, first + extra, side="right") for extra in (0, context - 1))
        covered = np.maximum.accumulate(np.append(-1, to))[:-1]
        return int((to - np.maximum(from_ - 1, covered)).clip(0).sum())

    def close(self) -> None:
        """Stop what is being loaded."""
        self._loading.shutdown(wait=False, cancel_futures=True)
