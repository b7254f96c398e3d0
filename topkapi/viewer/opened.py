"""A run that is looked at: its study and labels, and what takes time, loaded in the background.

The page shows as soon as the study's small arrays are mapped. Until the autoencoder and the tokenizer are there,
requests that need them wait; those that need the language model are refused (`topkapi.viewer.worker`).
"""

import os
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Event, get_native_id
from typing import Any

import numpy as np

import topkapi
from topkapi import published
from topkapi.data.language_model import LanguageModel, load_tokenizer
from topkapi.errors import TopkapiError
from topkapi.explore import Spliced
from topkapi.model import Autoencoder
from topkapi.parallel import device_of
from topkapi.study import Study
from topkapi.train import device_type, saved_config
from topkapi.viewer import latents, overview
from topkapi.viewer.columns import Table
from topkapi.viewer.experiments import Experiments
from topkapi.viewer.index import Index
from topkapi.viewer.labels import Labels
from topkapi.viewer.modes import warm_up
from topkapi.viewer.texts import Texts
from topkapi.viewer.worker import Worker

KEPT = 256  # latents whose numbers are kept, and tokens they vote for
BACKGROUND = 10  # niceness of threads that load and count
STOP_SECONDS = 2.0  # that the language model has to end what it does


class Opened:
    """A run, its study, its labels, and the language model if it is wanted.

    Raises:
        TopkapiError: no such run, a study of another one, damaged labels.
    """

    def __init__(self, run: Path, study: Study, model: bool) -> None:
        self.run, self.study = run, study
        study.require_run()
        self.config, self.published = saved_config(run), published.read_config(run)
        self.labels = Labels(run, study.identity["autoencoder"], study.n_latents)
        self.index = Index(study)
        self.table = Table(study, self.index)
        self.worker = Worker(self._load_spliced if model else None)
        self.describe = lru_cache(KEPT)(self._describe)
        self.votes = lru_cache(KEPT)(self._votes)
        self._stopping = Event()
        self._loading = ThreadPoolExecutor(4, thread_name_prefix="loading", initializer=_give_way)
        self._autoencoder: Future[Autoencoder] = Future()
        self._texts: Future[Texts] = Future()
        self._index: Future[None] = Future()

    def start(self) -> None:
        """Begin to load everything."""
        self._autoencoder = self._loading.submit(lambda: self.study.autoencoder)
        self._texts = self._loading.submit(lambda: Texts(load_tokenizer(self.config.language_model.name)))
        self._index = self._loading.submit(self._make_index)
        self._index.add_done_callback(lambda _: warm_up(self._stopping))
        self._loading.submit(self.table.current)  # now, and not while the first one who asks for it waits
        self.worker.start()

    def close(self) -> None:
        """Stop what is being loaded, counted or computed."""
        self._stopping.set()
        self._loading.shutdown(wait=False, cancel_futures=True)
        self.worker.stop(STOP_SECONDS)

    @property
    def name(self) -> str:
        """The run folder's own name."""
        return self.run.resolve().name

    @property
    def texts(self) -> Texts:
        """Tokens as texts; waits for the tokenizer, and raises what kept it from loading."""
        return self._texts.result()

    @property
    def experiments(self) -> Experiments:
        """What the language model can be asked for."""
        return Experiments(self.study, self.texts, self.labels)

    @property
    def overview(self) -> dict[str, Any]:
        """What all latents are like together, how training went and what was measured."""
        return self._of_study | overview.of_run(self.run)

    @cached_property
    def _of_study(self) -> dict[str, Any]:
        self._autoencoder.result()
        return overview.of_study(self.study)

    def wait_for_index(self) -> None:
        """Wait until the index is made; raises what kept it from being."""
        self._index.result()

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
            "trained_tokens": (self.published.get("summary") or {}).get("tokens"),
            "study": {
                "n_tokens": study.n_tokens,
                "context": study.context,
                "split": study.identity["split"],
                "reservoir": study.reservoir,
                "n_documents": self.n_documents,
            },
            "model": self.worker.facts(),
            "index": self._index_facts(),
            "version": topkapi.__version__,
            "d_dense": min(header["d_model"], study.n_latents),
        }

    @cached_property
    def n_documents(self) -> int:
        """Documents of which the study has text."""
        arrays, context = self.study.arrays, self.study.context
        first = arrays["context_ids"] * context
        begin, end = (
            np.searchsorted(arrays["document_offsets"], first + extra, side="right") for extra in (0, context - 1)
        )
        counted = np.maximum.accumulate(np.append(0, end))[:-1]  # documents up to the contexts before
        return int((end - np.maximum(begin - 1, counted)).clip(0).sum())

    def _index_facts(self) -> dict[str, Any]:
        """How far the index is: ready once its table is."""
        facts = self.index.facts()
        return facts | {"state": "building"} if facts["state"] == "ready" and not self._index.done() else facts

    def _make_index(self) -> None:
        self.index.build(lambda: self.texts, self._stopping)
        self.table.current()

    def _describe(self, i: int) -> dict[str, Any]:
        self._autoencoder.result()
        return latents.describe(self.study, [i])[0]

    def _votes(self, i: int) -> dict[str, Any]:
        """The tokens that latent i votes for and against; `worker.spliced` must be there."""
        return latents.votes(self.study, [i], self.worker.spliced.lm, self.texts)[0]

    def _load_spliced(self) -> Spliced:
        """The autoencoder in its language model, in float32, as effects of latents are small."""
        ae = self._autoencoder.result()
        self._texts.result()  # transformers' log lines are silenced for one thread at a time
        lm = LanguageModel.load(self.config.language_model, device_of(device_type(self.config)))
        if lm.fingerprint != self.study.identity["language_model"]:
            raise TopkapiError(f"{lm.name} is another language model than the one that was studied.")
        lm.model.float()
        # `to` moves a module in place, and requests read the study's own meanwhile
        return Spliced(lm, ae if lm.device == ae.W_dec.device else deepcopy(ae).to(lm.device))


def _give_way() -> None:
    """Leave the cores to answers and to the browser, where a thread may have a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, get_native_id(), BACKGROUND)
